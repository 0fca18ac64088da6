"""Find the FFNs that an adapter can stand beside, by their structure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from meft_engine.config import AdapterConfig, MeftConfigError
from meft_engine.zero_parameters import full_shape, gathered, is_partitioned


@dataclass(frozen=True)
class FFN:
    """An FFN of the model, or a block of experts in its place."""

    name: str
    """Its name in the model, such as ``model.layers.3.mlp``."""
    module: nn.Module
    """Holds the adapter."""
    entry: nn.Module
    """Its input is the FFN's; often the FFN itself."""
    exit: nn.Module
    """Its output is the FFN's; often the FFN itself."""
    layer: int
    """The index of its layer."""
    stack: str
    """Name of the module that runs the layers (and receives the attention mask), such as ``model``."""
    first_weight: Callable[[], Tensor]

    @property
    def portable_name(self) -> str:
        """Its name in a model that PEFT has not wrapped, by which rows are stored."""
        return self.name.removeprefix("base_model.model.")

    @property
    def gate_weight(self) -> Tensor:
        """Weight [f, d] of what the input meets first: of the gate, where there is one, and of all experts; under PEFT,
        the frozen one below the adapter. A copy, where ZeRO has partitioned it or where it is quantised."""
        parameters = list(self.entry.parameters())
        with gathered(parameters), torch.no_grad():
            weight = self.first_weight()
            return weight.clone() if any(map(is_partitioned, parameters)) else weight

    @cached_property
    def width(self) -> int:
        """The model's width d."""
        return self.gate_weight.shape[1]


@dataclass(frozen=True)
class _Shape:
    """How the FFNs of some families are built: the names of their parts, the first of which the input meets."""

    parts: tuple[str, ...]
    weight: Callable[[nn.Module], Tensor]
    split: bool = False
    """The parts stand in a module that does more than the FFN does, so the first and last of them are listened to."""

    def fits(self, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, part, None), nn.Module) for part in self.parts)


def _rows(projection: nn.Module) -> Tensor:
    """The weight [f, d] of a projection."""
    projection = getattr(projection, "base_layer", projection)
    weight = getattr(projection, "weight", None)
    if weight is None or not weight.is_floating_point():
        return _dequantised(projection)
    # transformers' Conv1D, GPT-2's projection, keeps [d, f].
    return projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight


def _dequantised(projection: nn.Module) -> Tensor:
    """The weight [f, d] that a quantised projection multiplies by, whatever its format: what it makes of a basis."""
    buffers = (*projection.parameters(), *projection.buffers())
    dtype = getattr(projection, "compute_dtype", None) or next(
        (t.dtype for t in buffers if t.is_floating_point()), torch.get_default_dtype()
    )
    basis = torch.eye(projection.in_features, dtype=dtype, device=buffers[0].device)
    return (projection(basis) - projection(torch.zeros_like(basis[:1]))).T


def _first_half(projection: nn.Module) -> Tensor:
    """The gate of a projection that holds gate and up, in this order."""
    weight = _rows(projection)
    return weight[: weight.shape[0] // 2]


def _of_experts(experts: nn.Module) -> Tensor:
    """The gates of all experts, one below the other, whether they are modules or stacked [experts, 2 f, d]."""
    if isinstance(experts, nn.ModuleList):
        gates = [next(getattr(e, part) for part in ("gate_proj", "w1") if hasattr(e, part)) for e in experts]
        return torch.cat([_rows(gate) for gate in gates])
    stacked = experts.gate_up_proj
    return stacked[:, : stacked.shape[1] // 2].flatten(0, 1)


def _is_expert_block(module: nn.Module) -> bool:
    experts = getattr(module, "experts", None)
    if isinstance(experts, nn.ModuleList):
        return bool(len(experts)) and any(hasattr(experts[0], part) for part in ("gate_proj", "w1"))
    gate_up, down = (getattr(experts, part, None) for part in ("gate_up_proj", "down_proj"))
    if not all(isinstance(stacked, Tensor) and len(full_shape(stacked)) == 3 for stacked in (gate_up, down)):
        return False
    # [experts, 2 f, d] and [experts, d, f]; some families, such as GPT-OSS, turn them and mix gate and up.
    _, width, inner = full_shape(down)
    return full_shape(gate_up)[1:] == (2 * inner, width)


# Llama, Mistral, Qwen, Gemma, OLMo · Phi-3 · T5 and its gated form · GPT-NeoX, Falcon, Bloom · GPT-2 · OPT, Phi-2, BART
_SHAPES = (
    _Shape(("gate_proj", "up_proj", "down_proj"), lambda m: _rows(m.gate_proj)),
    _Shape(("gate_up_proj", "down_proj"), lambda m: _first_half(m.gate_up_proj)),
    _Shape(("wi_0", "wi_1", "wo"), lambda m: _rows(m.wi_0)),
    _Shape(("wi", "wo"), lambda m: _rows(m.wi)),
    _Shape(("dense_h_to_4h", "dense_4h_to_h"), lambda m: _rows(m.dense_h_to_4h)),
    _Shape(("c_fc", "c_proj"), lambda m: _rows(m.c_fc)),
    _Shape(("fc1", "fc2"), lambda m: _rows(m.fc1), split=True),
)


def find_ffns(model: nn.Module, config: AdapterConfig) -> list[FFN]:
    """The FFNs to adapt, in the order of the model.

    Raises:
        MeftConfigError: if there is none, or ``layers_to_transform`` or ``target_modules`` matches none.
    """
    every = found = _recognised(model)
    patterns = config.target_modules
    if patterns is not None:
        named = [f for f in found if _matches(f.name, patterns)] or _as_named(model, patterns, found)
        if not named:
            known = f'FFNs, which are named like "{found[0].name}"' if found else "modules"
            raise MeftConfigError(f"adapter.target_modules = {patterns} matches none of the model's {known}")
        every, found = found or named, named
    if not found:
        raise MeftConfigError(
            f"no FFN found in {type(model).__name__}; name the modules that take its part in adapter.target_modules"
        )
    layers = config.layer_indices(1 + max(f.layer for f in every))
    if layers is None:
        return found
    chosen = [f for f in found if f.layer in layers]
    if not chosen:
        raise MeftConfigError(
            f"adapter.layers_to_transform = {config.layers_to_transform} and adapter.target_modules = "
            f"{config.target_modules} have no FFN in common; leave one of them out"
        )
    return chosen


def _recognised(model: nn.Module) -> list[FFN]:
    found: list[FFN] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{f.name}.") for f in found if not _is_split(f)):
            continue  # an expert of a block that is adapted as a whole
        if _is_expert_block(module):
            experts = module.experts
            found.append(FFN(name, module, module, module, *_place(name), lambda e=experts: _of_experts(e)))
            continue
        shape = next((shape for shape in _SHAPES if shape.fits(module)), None)
        if shape is not None:
            first, last = shape.parts[0], shape.parts[-1]
            ends = (getattr(module, first), getattr(module, last)) if shape.split else (module, module)
            found.append(FFN(name, module, *ends, *_place(name), lambda s=shape, m=module: s.weight(m)))
    return found


def _is_split(ffn: FFN) -> bool:
    return ffn.entry is not ffn.module


def _as_named(model: nn.Module, patterns: list[str], recognised: list[FFN]) -> list[FFN]:
    """Modules that the user names and that are built in no way known here; the outermost ones that match.

    They have to hold a linear layer and to give back the width that it takes, and to be no more than an FFN: a whole
    layer, which holds one, is not what was meant.
    """
    found: list[FFN] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{f.name}.") for f in found)
        around = any(f.name.startswith(f"{name}.") for f in recognised)
        if inside or around or not name or not _matches(name, patterns):
            continue
        linear = [m for m in module.modules() if isinstance(m, nn.Linear) and m is not module]
        if linear and linear[0].in_features == linear[-1].out_features:
            # A sequence would run whatever is put into it.
            holder = linear[0] if isinstance(module, nn.Sequential) else module
            found.append(FFN(name, holder, module, module, *_place(name), lambda m=linear[0]: _rows(m)))
    return found


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(rf"(?:{pattern})$", name) for pattern in patterns)


def _place(name: str) -> tuple[int, str]:
    """The layer's index and the stack's name: ``a.layers.3.mlp`` is in layer 3 of the stack ``a``."""
    parts = name.split(".")
    # The first number: T5's layers are lists themselves, as in ``encoder.block.3.layer.1.DenseReluDense``.
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return 0, ""
    return int(parts[number]), ".".join(parts[: max(0, number - 1)])
