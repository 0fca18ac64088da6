"""What the rows of an adapter do on a text, and what another set of rows changes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.adapter.module import SparseAdapter
from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_kernels.dispatch import Overflow, Selection

TOLERANCE = 1e-6
"""What logits may differ by and count as equal, as a share of the largest of them."""


class Picks(NamedTuple):
    """What the tokens of one forward have picked in one FFN, each [P] on the CPU."""

    tokens: Tensor
    """int64, counted over the real tokens of the batch."""
    rows: Tensor
    """int64."""
    activations: Tensor
    """float64, all positive."""


@dataclass(frozen=True)
class Comparison:
    """How two adapters over one base differ on a text."""

    tokens: int
    displaced_mass: float
    """Share of the first one's activation that was on picks which the second does not make, in [0, 1]."""
    mean_change: float
    """Of logits, absolute."""
    max_change: float
    bit_equal: bool
    """Whether all logits have the same bits."""
    equal: bool
    """Whether no logit differs by more than :data:`TOLERANCE` of the largest."""


@torch.no_grad()
def row_use(model: nn.Module, attached: AttachedAdapters, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How much every row contributes: its activation, summed over the tokens of a text, times the norm of its value.

    Args:
        model: in evaluation mode, with these adapters. batches: its inputs, by their names.

    Returns:
        By the name of the FFN, [r] float64 on the CPU; 0 where no token picks a row.
    """
    use = {name: torch.zeros(adapter.keys.rows, dtype=torch.float64) for name, adapter in _by_name(attached).items()}
    for batch in batches:
        with watched(attached) as seen:
            model(**batch)
        for name, forwards in seen.items():
            for picks in forwards:
                use[name].index_add_(0, picks.rows, picks.activations)
    return {name: use[name] * _norms(adapter.values) for name, adapter in _by_name(attached).items()}


@torch.no_grad()
def compare(
    one: tuple[nn.Module, AttachedAdapters],
    other: tuple[nn.Module, AttachedAdapters],
    batches: Sequence[Mapping[str, Any]],
    place: Mapping[str, Tensor],
) -> Comparison:
    """What changes from one adapter to another; both models are in evaluation mode, and no logits are kept.

    Args:
        batches: inputs of the models, by their names; what ``attention_mask`` leaves out does not count.
        place: by the name of the FFN, [r] int64: which row of the other each row of the one is; -1: none.
    """
    rows = other[1].config.adapter.rows
    tokens, logits, total, displaced = 0, 0, 0.0, 0.0
    sum_of_changes, largest, bit_equal = 0.0, torch.zeros(2, dtype=torch.float64), True
    for batch in batches:
        with watched(one[1]) as before, watched(other[1]) as after:
            first, second = one[0](**batch).logits, other[0](**batch).logits
        mask = batch.get("attention_mask")
        if mask is not None:
            first, second = first[mask.bool()], second[mask.bool()]
        change = (first.float() - second.float()).abs()
        tokens, logits = tokens + change.shape[:-1].numel(), logits + change.numel()
        sum_of_changes += float(change.sum(dtype=torch.float64))
        extremes = torch.stack([change.max(), first.float().abs().max()]).double().cpu()
        largest = torch.maximum(largest, extremes)
        bit_equal &= torch.equal(first, second)
        for name, forwards in before.items():
            for picks, later in zip(forwards, after[name], strict=True):
                now = place[name][picks.rows]
                stays = (now >= 0) & torch.isin(picks.tokens * rows + now, later.tokens * rows + later.rows)
                total += float(picks.activations.sum())
                displaced += float(picks.activations[~stays].sum())
    max_change, max_logit = largest.tolist()
    return Comparison(
        tokens=tokens,
        displaced_mass=displaced / total if total else 0.0,
        mean_change=sum_of_changes / max(1, logits),
        max_change=max_change,
        bit_equal=bit_equal,
        equal=max_change <= TOLERANCE * max_logit,
    )


@contextmanager
def watched(attached: AttachedAdapters) -> Iterator[dict[str, list[Picks]]]:
    """Inside, what every adapter picks, by the name of its FFN and in the order of its forwards."""
    adapters = _by_name(attached)
    seen: dict[str, list[Picks]] = {name: [] for name in adapters}
    for name, adapter in adapters.items():
        adapter.observers.append(_noting(seen[name]))
    try:
        yield seen
    finally:
        for adapter in adapters.values():
            adapter.observers.pop()


def _noting(forwards: list[Picks]) -> Callable[[Selection, Tensor, Overflow], None]:
    def observe(selection: Selection, activations: Tensor, overflow: Overflow) -> None:
        valid = selection.valid
        rows = selection.active[selection.picks[valid]]
        tokens = valid.nonzero()[:, 0]
        forwards.append(Picks(tokens.cpu(), rows.cpu(), activations[valid].double().cpu()))

    return observe


def _by_name(attached: AttachedAdapters) -> dict[str, SparseAdapter]:
    return {adapter.name: adapter for adapter in attached.adapters.values()}


def _norms(values: PartiallyOffloadedTensor) -> Tensor:
    """[r] float64: of the rows that the model computes with."""
    parts = pieces(slice(0, values.rows), values.width * torch.float64.itemsize)
    return torch.cat([values.planes()[0][part].double().norm(dim=1) for part in parts])
