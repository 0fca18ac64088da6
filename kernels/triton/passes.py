"""The functions of ``kernels/sparse.py`` in Triton.

The selection's rows are counted on the device; that they are handed on as a tensor of just as many is the one place
where the host waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.sparse import Chosen, Inputs, Overflow, PickGradients, RowsAt, Selection
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
score_picks = sparse.score_picks
logits_of = sparse.logits_of
logit_gradients = sparse.logit_gradients


def inputs(h: Tensor, center: Tensor | None) -> Inputs:
    """As :func:`meft_kernels.sparse.inputs`, but that kernels subtract the center as they read."""
    return Inputs(h, center)


def choose_experts(given: Inputs, router: Tensor, experts_per_token: int, gate: str, bias: Tensor | None) -> Chosen:
    """As :func:`meft_kernels.sparse.choose_experts`."""
    return Chosen(*route(given.h, router, experts_per_token, gate, center=given.center, bias=bias), logits=None)


def choose_rows(
    given: Inputs, keys: Tensor, chosen: Chosen, *, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """As :func:`meft_kernels.sparse.choose_rows`."""
    experts, gates, counts, _ = chosen
    rows, per_token = keys.shape[0], experts.shape[1]
    scores = score(given.h, keys, experts, counts, expert_lists(experts, counts), center=given.center)
    top_k = min(top_k, per_token * (rows // counts.shape[0]))
    ids, slots, raw, activations = pick(scores, experts, gates, top_k, rows)
    wanted = active = compact(ids, rows)
    total = kept_mass = activations.sum()
    if cap is not None and cap < wanted.rows.shape[0]:
        active = keep_largest(wanted, activations, cap)
        kept_mass = torch.where(active.valid, activations, 0).sum()
        slots, raw = (torch.where(active.valid, of_pick, 0) for of_pick in (slots, raw))
    counted, kept = torch.cat((wanted.count, active.count)).tolist()
    selection = Selection(experts, active.rows[:kept].long(), active.positions, slots, active.valid)
    return selection, raw, Overflow(counted, total, kept_mass)


def combine_rows(weights: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """As :func:`meft_kernels.sparse.combine_rows`."""
    return combine(weights, selection.picks, selection.valid, rows.table, places=rows.places)


def gradients(
    grad_y: Tensor,
    given: Inputs,
    scores: Tensor,
    gates: Tensor,
    values: RowsAt,
    keys: RowsAt,
    selection: Selection,
    room: Callable[[int, int], Tensor] = torch.empty,
) -> PickGradients:
    """As :func:`meft_kernels.sparse.gradients`."""
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
    row_gradients(
        grad_y,
        given.h,
        scores * picked_gates(gates, selection),
        grad_scores,
        lists,
        grad_values,
        grad_keys,
        slots=torch.arange(active, dtype=torch.int32, device=grad_y.device),
        fresh=torch.ones(active, dtype=torch.int32, device=grad_y.device),
        center=given.center,
    )
    return PickGradients(
        combine(grad_scores, picks, valid, keys.table, places=keys.places), grad_gates, grad_values, grad_keys
    )
