"""The functions of ``kernels/sparse.py`` in Triton.

How many rows are active is known to the device alone: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.quantized import QuantizedRows
from meft_kernels.sparse import Chosen, GradientPlaces, Inputs, Overflow, PickGradients, RowsAt, Selection
from meft_kernels.triton.cap import keep_largest
from meft_kernels.triton.combine import combine
from meft_kernels.triton.compact import compact
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.pick import pick
from meft_kernels.triton.pick_gradients import pick_gradients
from meft_kernels.triton.route import route
from meft_kernels.triton.row_gradients import row_gradients
from meft_kernels.triton.score import score

picked_gates = sparse.picked_gates
gates_of = sparse.gates_of
logits_of = sparse.logits_of
logit_gradients = sparse.logit_gradients


def inputs(h: Tensor, center: Tensor | None) -> Inputs:
    """As :func:`meft_kernels.sparse.inputs`, but that kernels subtract the center as they read."""
    return Inputs(h, center)


def choose_experts(given: Inputs, router: Tensor, experts_per_token: int, gate: str, bias: Tensor | None) -> Chosen:
    """As :func:`meft_kernels.sparse.choose_experts`."""
    return Chosen(*route(given.h, router, experts_per_token, gate, center=given.center, bias=bias), logits=None)


def choose_rows(
    given: Inputs, keys: Tensor | QuantizedRows, chosen: Chosen, *, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """As :func:`meft_kernels.sparse.choose_rows`."""
    experts, gates, counts, _ = chosen
    rows, per_token = keys.shape[0], experts.shape[1]
    table, scales = _parts(keys)
    pairs = expert_lists(experts, counts)
    scores = score(given.h, table, experts, counts, pairs, scales=scales, center=given.center)
    top_k = min(top_k, per_token * (rows // counts.shape[0]))
    ids, slots, raw, activations = pick(scores, experts, gates, top_k, rows)
    wanted = active = compact(ids, rows)
    total = kept_mass = activations.sum()
    if cap is not None and cap < wanted.rows.shape[0]:
        active = keep_largest(wanted, activations, cap)
        kept_mass = torch.where(active.valid, activations, 0).sum()
        slots, raw = (torch.where(active.valid, of_pick, 0) for of_pick in (slots, raw))
    selection = Selection(experts, active.rows.long(), active.positions, slots, active.valid, active.count)
    return selection, raw, Overflow(wanted.count[0], total, kept_mass)


def score_picks(x: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """As :func:`meft_kernels.sparse.score_picks`."""
    if isinstance(rows.table, QuantizedRows):
        return sparse.score_picks(x, rows, selection)
    # The gradient of a score is such a product, times a gate.
    gates, none = x.new_ones(x.shape[0], 1), torch.zeros_like(selection.slots)
    picks, valid = selection.picks, selection.valid
    return pick_gradients(x, none.float(), gates, none, picks, valid, rows.table, rows.places)[0]


def combine_rows(weights: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """As :func:`meft_kernels.sparse.combine_rows`."""
    table, scales = _parts(rows.table)
    return combine(weights, selection.picks, selection.valid, table, places=rows.places, scales=scales)


def gradients(
    grad_y: Tensor,
    given: Inputs,
    scores: Tensor,
    gates: Tensor,
    values: RowsAt,
    keys: RowsAt,
    selection: Selection,
    room: Callable[[int, int], Tensor] = torch.empty,
    places: GradientPlaces | None = None,
) -> PickGradients:
    """As :func:`meft_kernels.sparse.gradients`; rows of the result from U on are not set where U is not known."""
    active, (tokens, width) = selection.active.numel(), grad_y.shape
    if not active:
        nothing = grad_y.new_zeros(0, width, dtype=torch.float32)
        return PickGradients(
            grad_y.new_zeros(tokens, width, dtype=torch.float32), torch.zeros_like(gates), nothing, nothing
        )
    picks, valid = selection.picks, selection.valid
    grad_scores, grad_gates = pick_gradients(
        grad_y, scores, gates, selection.slots, picks, valid, values.table, values.places
    )
    lists = compact(torch.where(valid, picks, active).int(), active)
    grad_values, grad_keys = (torch.empty(active, width, device=grad_y.device) for _ in range(2))
    fresh = torch.ones(active, dtype=torch.int32, device=grad_y.device)
    targets = [(grad_values, grad_keys, fresh.cumsum(0, dtype=torch.int32) - 1, fresh)]
    if places is not None:
        targets = [
            (places.values, places.keys, places.slots, places.fresh),
            (grad_values, grad_keys, places.rest, fresh),
        ]
    activations = scores * picked_gates(gates, selection)
    for of_values, of_keys, slots, fresh in targets:
        row_gradients(
            grad_y,
            given.h,
            activations,
            grad_scores,
            lists,
            of_values,
            of_keys,
            slots=slots,
            fresh=fresh,
            center=given.center,
        )
    return PickGradients(combine_rows(grad_scores, keys, selection), grad_gates, grad_values, grad_keys)


def _parts(table: Tensor | QuantizedRows) -> tuple[Tensor, Tensor | None]:
    """What kernels read: the table, and the scales of its rows."""
    return (table.codes, table.scales) if isinstance(table, QuantizedRows) else (table, None)
