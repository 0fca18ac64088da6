"""Engines that hand over what trains beside the rows: how they are built, and what an engine takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import meft_engine
from meft_engine.checkpoint import engine_state, parameter_state
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import differing, ds_config
from tests.integration.test_lora_base import with_lora

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "total_num_steps": 24}}


class Counting(nn.Module):
    """Something with a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self) -> None:
        if self.training:
            self.batches += 1
            self.passing += 1


def make_engine(
    *,
    lora: bool = True,
    adam: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    block: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
    optimizer: Any = None,
    **settings: Any,
) -> Any:
    """With a schedule, one norm, and a model that has a buffer.

    Args:
        lora: whether one trains beside the routers. adam: of the JSON's AdamW. zero: of ``zero_optimization``.
        block: of the adapter. shape: of the model. optimizer: makes the client's, from the model.
    """
    model = tiny_llama(num_hidden_layers=2, **(shape or {}))
    model.counting = Counting()
    model.register_forward_hook(lambda module, *_: module.counting())
    if lora:
        model = with_lora(model, ["q_proj", "v_proj"])
    settings = {**({} if optimizer else {"scheduler": SCHEDULE}), "clip": 0.5, **settings}
    config = ds_config(tiny_block(block), adam={} if optimizer else {**ADAM, **(adam or {})}, **settings)
    config.get("zero_optimization", {}).update(zero or {})
    client = optimizer(model) if optimizer else None
    engine = meft_engine.initialize(model=model, optimizer=client, config=config)[0]
    fill_values(engine.meft_adapters)
    return engine


def compute_copies(engine: Any) -> dict[str, Tensor]:
    """What the model computes with, of what is trained."""
    from deepspeed import zero

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"{name}/compute"] = parameter.detach().float().cpu().clone()
    return found


def model_states(folder: Path) -> dict[str, Any]:
    """DeepSpeed's, of whatever stage; nothing but tensors and plain values is allowed in it."""
    names = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
    return torch.load(next(path for name in names if (path := folder / name).exists()), weights_only=True)


def take_over(engine: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Let an engine go on where another was when it captured the tensors and saved the folder."""
    client_state = parameter_state.restore_progress(engine, model_states(folder))
    assert client_state["epoch"] == 3 and not client_state.keys() & {"module", "optimizer", "lr_scheduler"}
    parameter_state.restore(engine, tensors)
    again = parameter_state.capture(engine)
    assert differing(again, tensors if engine.ranks.rank == 0 else {}) == []
    compute = compute_copies(engine)
    dtype = engine.get_data_types()[0]
    for name, value in compute.items():
        assert torch.equal(value, tensors[name.replace("/compute", "/master")].to(dtype).float()), name
    engine_state.load(engine, folder, resume=True)
    assert differing(compute, compute_copies(engine)) == [], "the adapter's file holds the same routers"
