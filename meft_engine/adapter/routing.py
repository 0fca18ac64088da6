"""Choosing a micro-batch's rows: the gate, and the selection with its bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meft_kernels.dispatch import Chosen, Inputs, Overflow, Selection, token_passes


class ActiveRowsOverflow(RuntimeError):
    """More rows are active than ``active_rows.cap`` allows, and ``active_rows.on_overflow`` is ``"raise"``."""


@dataclass
class RoutingStats:
    """What one adapter selected over its training micro-batches (recomputations are not counted again)."""

    micro_batches: int = 0
    tokens: int = 0
    """In all of them, without padding."""
    most_tokens: int = 0
    """In one of them."""
    active_rows: Tensor | int = 0
    """Added up over them; a scalar on the device where that alone knows it."""
    mass: Tensor | None = field(default=None, repr=False)
    """[2] float64: total activation of all picks, and of those that the cap kept."""

    load: Tensor | None = field(default=None, repr=False)
    """[N] float64, which counts on where float32 would stop at 2²⁴: how many tokens have chosen each expert."""
    step_load: Tensor | None = field(default=None, repr=False)
    """[N]: the same since the last optimizer step."""

    def count(self, tokens: int, active_rows: Tensor | int, overflow: Overflow, load: Tensor) -> None:
        self.micro_batches += 1
        self.tokens += tokens
        self.most_tokens = max(self.most_tokens, tokens)
        self.load = load.double() if self.load is None else self.load + load
        self.step_load = load if self.step_load is None else self.step_load + load
        self.active_rows = self.active_rows + active_rows
        mass = torch.stack((overflow.mass, overflow.kept_mass)).double()
        self.mass = mass if self.mass is None else self.mass + mass


def choose_rows(
    name: str,
    given: Inputs,
    keys: Tensor,
    chosen: Chosen,
    *,
    top_k: int,
    cap: int | None,
    on_overflow: str,
) -> tuple[Selection, Tensor, Overflow]:
    """The selection of one micro-batch, the raw scores [T, K] of its picks, and what the cap did.

    Args:
        name: of the layer, for the error. keys: [r, d]; where they are, rows are chosen, for which inputs go there.

    Raises:
        ActiveRowsOverflow: if more than ``cap`` rows are active and ``on_overflow`` is ``"raise"``.
    """
    device = given.h.device
    if keys.device != device:
        given, chosen = _moved(given, keys.device), _moved(chosen, keys.device)
    passes = token_passes(keys.device)
    selection, raw, overflow = passes.choose_rows(passes.inputs(*given), keys, chosen, top_k=top_k, cap=cap)
    if keys.device != device:
        selection, raw, overflow = _moved(selection, device), raw.to(device), _moved(overflow, device)
    if on_overflow == "raise" and cap is not None and overflow.wanted_rows > cap:
        raise ActiveRowsOverflow(
            f"{name}: a micro-batch of {given.h.shape[0]} tokens activates {int(overflow.wanted_rows)} rows, more than "
            f"active_rows.cap = {cap}; raise the cap, shrink the micro-batch, or set active_rows.on_overflow to "
            '"keep_largest"'
        )
    return selection, raw, overflow


def _moved(parts: Any, device: torch.device) -> Any:
    """The tensors of a named tuple or a dataclass, on another device."""
    names = parts._fields if isinstance(parts, tuple) else vars(parts)
    moved = {name: getattr(parts, name) for name in names}
    moved = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in moved.items()}
    return type(parts)(**moved)
