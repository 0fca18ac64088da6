"""What a model is made of, read from its configuration alone: no weight is read or allocated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meft_engine.adapter.discover import find_ffns
from meft_engine.config import AdapterConfig, MeftConfigError


@dataclass(frozen=True)
class ModelShape:
    """A transformer, as far as memory goes."""

    layers: int
    width: int
    intermediate: int
    """Width of the FFNs."""
    vocabulary: int
    parameters: int
    """Elements of the base; tied ones count once."""
    ffn_widths: tuple[int, ...] = ()
    """Of each FFN that gets an adapter; empty: those of all layers, as wide as the model."""
    largest_module: int = 0
    """Elements of the largest embedding, head or layer, which a device needs whole however they are partitioned."""

    def adapted(self, adapter: AdapterConfig) -> tuple[int, ...]:
        """The widths of the FFNs that get an adapter.

        Raises:
            MeftConfigError: if ``layers_to_transform`` names layers that there are not.
        """
        if self.ffn_widths:
            return self.ffn_widths
        chosen = adapter.layer_indices(self.layers)
        return (self.width,) * (self.layers if chosen is None else len(chosen))


def read_config(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder or of a model of the hub.

    Raises:
        MeftConfigError: if there is none, or it asks for code of its own and ``trust_remote_code`` is not set.
    """
    from transformers import AutoConfig

    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise MeftConfigError(
            f"--model = {name_or_path} holds no config.json; name a folder that save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers, the hub and their network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remote = " or pass --trust_remote_code if you trust its code;" if "remote code" in str(error) else ""
        raise MeftConfigError(
            f"--model = {name_or_path} has no configuration that transformers reads;{remote} name a folder with a "
            f"config.json or a model of the hub ({reason})"
        ) from None


@contextmanager
def imagined(
    name_or_path: str | Path | Any, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Iterator[nn.Module]:
    """A model that has shapes and no memory, inside the ``with``; what is computed there is imagined too.

    Args:
        name_or_path: or a transformers configuration.

    Raises:
        MeftConfigError: as :func:`read_config` does, or for a configuration of what is no language model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    named = isinstance(name_or_path, (str, Path))
    config = read_config(name_or_path, trust_remote_code=trust_remote_code) if named else name_or_path
    family = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    # What goes wrong in there is said by whoever asked, not in pages of log.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = family.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise MeftConfigError(
                f"--model = {name_or_path if named else type(config).__name__} is no language model ({reason})"
            ) from None
        yield model


def shape_of(model: nn.Module, adapter: AdapterConfig) -> ModelShape:
    """Of a model, imagined or not.

    Raises:
        MeftConfigError: if no FFN of it can be adapted as the block says.
    """
    config = model.config.get_text_config()
    ffns = find_ffns(model, adapter)
    layers = _first(config, ("num_hidden_layers", "n_layer", "num_layers")) or 1 + max(ffn.layer for ffn in ffns)
    width = _first(config, ("hidden_size", "d_model", "n_embd")) or ffns[0].width
    intermediate = _first(config, ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"))
    return ModelShape(
        layers=layers,
        width=width,
        intermediate=intermediate or ffns[0].gate_weight.shape[0],
        vocabulary=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        ffn_widths=tuple(ffn.width for ffn in ffns),
        largest_module=_largest_module(model),
    )


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _largest_module(model: nn.Module) -> int:
    """Elements of the largest part that is used at once: an embedding, a head, or a layer."""
    layers = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return max((sum(p.numel() for p in part.parameters()) for part in (*layers, *ends)), default=0)
