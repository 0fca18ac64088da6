"""Find the FFNs that an adapter can stand beside, by their structure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from meft_engine.config import AdapterConfig, MeftConfigError

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FFN:
    """A gated FFN of the model."""

    name: str
    """Its name in the model, such as ``model.layers.3.mlp``."""
    module: nn.Module
    layer: int
    """The index of its layer."""
    stack: str
    """Name of the module that runs the layers (and receives the attention mask), such as ``model``."""

    @property
    def gate_weight(self) -> Tensor:
        """Weight [f, d] of the gate projection; under PEFT, the frozen one below the adapter."""
        projection = self.module.gate_proj
        return getattr(projection, "base_layer", projection).weight

    @property
    def width(self) -> int:
        """The model's width d."""
        return self.gate_weight.shape[1]


def find_ffns(model: nn.Module, config: AdapterConfig) -> list[FFN]:
    """The FFNs to adapt, in the order of the model.

    Raises:
        MeftConfigError: if there is none, or ``layers_to_transform`` or ``target_modules`` matches none.
    """
    found = [
        FFN(name, module, *_place(name))
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, projection, None), nn.Module) for projection in _PROJECTIONS)
    ]
    if not found:
        raise MeftConfigError(
            f"no FFN with {', '.join(_PROJECTIONS)} found in {type(model).__name__}; MEFT adapts models of the Llama "
            "family"
        )
    layers = config.layer_indices(1 + max(f.layer for f in found))
    if config.target_modules is not None:
        named = [f for f in found if any(re.search(rf"(?:{p})$", f.name) for p in config.target_modules)]
        if not named:
            raise MeftConfigError(
                f"adapter.target_modules = {config.target_modules} matches none of the model's FFNs, which are named "
                f'like "{found[0].name}"'
            )
        found = named
    if layers is None:
        return found
    chosen = [f for f in found if f.layer in layers]
    if not chosen:
        raise MeftConfigError(
            f"adapter.layers_to_transform = {config.layers_to_transform} and adapter.target_modules = "
            f"{config.target_modules} have no FFN in common; leave one of them out"
        )
    return chosen


def _place(name: str) -> tuple[int, str]:
    """The layer's index and the stack's name: ``a.layers.3.mlp`` is in layer 3 of the stack ``a``."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return 0, ""
    last = numbered[-1]
    return int(parts[last]), ".".join(parts[: max(0, last - 1)])
