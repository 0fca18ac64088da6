"""What ``adapter_config.json`` says in PEFT's own words, so that PEFT and the hub know what an adapter belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from meft_engine.config import AdapterConfig


def peft_keys(model: nn.Module, adapter: AdapterConfig) -> dict[str, Any]:
    """The keys of PEFT's configurations, for an adapter of this model.

    ``task_type`` is given where PEFT's class for it has nothing to train of its own; for other models of transformers
    ``auto_mapping`` names the class, from which ``AutoPeftModel`` builds them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base).__name__
    task = None
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        task = "CAUSAL_LM"
    elif getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM"
    return {
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "revision": None,
        "task_type": task,
        "auto_mapping": {"base_model_class": kind, "parent_library": type(base).__module__} if task is None else None,
        "inference_mode": True,
        "target_modules": adapter.target_modules,
    }
