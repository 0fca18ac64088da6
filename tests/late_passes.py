"""The CPU's passes, as a device has them that does not tell the host how many rows are active.

Selections are padded with rows that do not exist, and gradients with NaN, so that whoever reads more than there is
notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.cpu import native_sparse
from meft_kernels.sparse import Chosen, GradientPlaces, Inputs, Overflow, PickGradients, RowsAt, Selection

inputs = sparse.inputs
logits_of = sparse.logits_of
logit_gradients = sparse.logit_gradients
gates_of = sparse.gates_of
picked_gates = sparse.picked_gates


def _passes() -> ModuleType:
    return native_sparse if native_sparse.library() is not None else sparse


def choose_experts(*args: Any) -> Chosen:
    """As on the CPU."""
    return _passes().choose_experts(*args)


def choose_rows(
    given: Inputs, keys: Tensor, chosen: Chosen, *, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """The selection has room for as many rows as could be active."""
    selection, raw, overflow = _passes().choose_rows(given, keys, chosen, top_k=top_k, cap=cap)
    most, found = min(keys.shape[0], selection.picks.numel()), selection.active.numel()
    most = max(min(most, cap) if cap is not None else most, found)
    active = torch.cat((selection.active, torch.full((most - found,), -1)))
    count = torch.tensor([found], dtype=torch.int32)
    overflow = replace(overflow, wanted_rows=torch.tensor(overflow.wanted_rows))
    return replace(selection, active=active, count=count), raw, overflow


def score_picks(x: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """Of the rows that are active."""
    return _passes().score_picks(x, *_known(selection, rows))


def combine_rows(weights: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """Of the rows that are active."""
    return _passes().combine_rows(weights, *_known(selection, rows))


def gradients(
    grad_y: Tensor,
    given: Inputs,
    scores: Tensor,
    gates: Tensor,
    values: RowsAt,
    keys: RowsAt,
    selection: Selection,
    room: Callable[[int, int], Tensor],
    places: GradientPlaces | None,
) -> PickGradients:
    """With room for the gradients of as many rows as could be active."""
    values, _ = _known(selection, values)
    keys, known = _known(selection, keys)
    found = _passes().gradients(grad_y, given, scores, gates, values, keys, known, room, places)
    junk = found.values.new_full((selection.active.numel() - found.values.shape[0], grad_y.shape[1]), torch.nan)
    of_values, of_keys = (torch.cat((grad, junk)) for grad in (found.values, found.keys))
    norms = found.squared_norms and tuple(
        torch.cat((one, junk.new_full(junk.shape[:1], torch.nan))) for one in found[4]
    )
    return found._replace(values=of_values, keys=of_keys, squared_norms=norms)


def _known(selection: Selection, rows: RowsAt) -> tuple[RowsAt, Selection]:
    """Without what is behind the last active row."""
    found = int(selection.count)
    places = rows.places[:found].long() if rows.places is not None else None
    return RowsAt(rows.table, places), replace(selection, active=selection.active[:found], count=None)
