"""The functions of ``kernels/sparse.py`` on the CPU, compiled; only their arguments and results are tensors.

Rows are read where they lie. Nothing has as many elements as a table has rows, but for one bit each. Tensors have names
for as long as C++ reads them: of an address alone it does not know that the memory is in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.cpu.build import address, library
from meft_kernels.quantized import QuantizedRows
from meft_kernels.sparse import Chosen, GradientPlaces, Inputs, Overflow, PickGradients, RowsAt, Selection

inputs = sparse.inputs
logits_of = sparse.logits_of
logit_gradients = sparse.logit_gradients


def choose_experts(given: Inputs, router: Tensor, experts_per_token: int, gate: str, bias: Tensor | None) -> Chosen:
    """As :func:`meft_kernels.sparse.choose_experts`."""
    return sparse.choose_experts(given, router, experts_per_token, gate, bias, largest=route)


def choose_rows(
    given: Inputs, keys: Tensor | QuantizedRows, chosen: Chosen, *, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """As :func:`meft_kernels.sparse.choose_rows`."""
    score = sparse.score_experts if isinstance(keys, QuantizedRows) else score_experts
    scores = score(given.x, keys, chosen.experts, chosen.counts.shape[0])
    return select(chosen.experts, chosen.gates, scores, rows=keys.shape[0], top_k=top_k, cap=cap)


def route(logits: Tensor, experts_per_token: int) -> Tensor:
    """As :func:`meft_kernels.sparse.route`."""
    return _largest(logits, experts_per_token)


def score_experts(h: Tensor, keys: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """As :func:`meft_kernels.sparse.score_experts`; keys in bfloat16 or float32."""
    (tokens, per_token), (rows, width) = experts.shape, keys.shape
    expert_rows = rows // num_experts
    h, scores = h.contiguous(), torch.empty(tokens, per_token, expert_rows)
    library().meft_score_experts(
        *(tokens, per_token, width, num_experts, expert_rows),
        address(h, torch.float32),
        *_table(keys),
        address(experts, torch.int64),
        address(scores, torch.float32),
        torch.get_num_threads(),
    )
    return scores


def select(
    experts: Tensor, gates: Tensor, scores: Tensor, *, rows: int, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """As :func:`meft_kernels.sparse.select`."""
    tokens, per_token, expert_rows = scores.shape
    top_k = min(top_k, per_token * expert_rows)
    gates, usable = gates.contiguous(), ~gates.isnan()
    row_ids, slots, picks = (torch.empty(tokens, top_k, dtype=torch.int64) for _ in range(3))
    raw, activations = torch.empty(tokens, top_k), torch.empty(tokens, top_k)
    valid = torch.empty(tokens, top_k, dtype=torch.bool)
    library().meft_select(
        *(tokens, per_token, expert_rows, top_k),
        address(scores, torch.float32),
        address(gates, torch.float32),
        address(usable, torch.bool),
        address(experts, torch.int64),
        *(address(result, torch.int64) for result in (row_ids, slots)),
        address(valid, torch.bool),
        *(address(result, torch.float32) for result in (raw, activations)),
        torch.get_num_threads(),
    )
    active = torch.empty(min(rows, tokens * top_k), dtype=torch.int64)
    wanted = library().meft_index_rows(
        *(tokens * top_k, rows),
        address(row_ids, torch.int64),
        address(valid, torch.bool),
        *(address(result, torch.int64) for result in (active, picks)),
    )
    active = active[:wanted].clone()
    total = kept_mass = activations.sum()
    if cap is not None and wanted > cap:
        mass = torch.zeros(wanted).index_add_(0, picks[valid], activations[valid])
        kept = _largest(mass[None], cap)[0]
        place = torch.full((wanted,), -1)
        place[kept] = torch.arange(cap)
        active, kept_mass = active[kept], mass[kept].sum()
        valid &= place[picks] >= 0
        picks, slots, raw = (torch.where(valid, of_pick, 0) for of_pick in (place[picks], slots, raw))
    return Selection(experts, active, picks, slots, valid), raw, Overflow(wanted, total, kept_mass)


def score_picks(x: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """As :func:`meft_kernels.sparse.score_picks`."""
    (tokens, top_k), rows = selection.picks.shape, rows.unquantized()
    if not selection.active.numel():
        return torch.zeros(tokens, top_k)
    x, ids, scores = x.contiguous(), _ids(rows, selection), torch.empty(tokens, top_k)
    library().meft_score_picks(
        *(tokens, top_k, rows.table.shape[1]),
        address(x, torch.float32),
        address(ids, torch.int64),
        address(selection.valid, torch.bool),
        *_table(rows.table),
        address(scores, torch.float32),
        torch.get_num_threads(),
    )
    return scores


def combine_rows(weights: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """As :func:`meft_kernels.sparse.combine_rows`."""
    rows = rows.unquantized()
    (tokens, top_k), width = selection.picks.shape, rows.table.shape[1]
    if not selection.active.numel():
        return torch.zeros(tokens, width)
    weights, ids, out = weights.contiguous(), _ids(rows, selection), torch.empty(tokens, width)
    library().meft_combine_rows(
        *(tokens, top_k, width),
        address(weights, torch.float32),
        address(ids, torch.int64),
        address(selection.valid, torch.bool),
        *_table(rows.table),
        address(out, torch.float32),
        torch.get_num_threads(),
    )
    return out


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
    """As :func:`meft_kernels.sparse.gradients`."""
    x, grad_y = given.x, grad_y.float()
    (tokens, top_k), (width, per_token) = selection.picks.shape, (x.shape[1], gates.shape[1])
    active = selection.active.numel()
    if not active:
        nothing = torch.zeros(0, width)
        return PickGradients(torch.zeros(tokens, width), torch.zeros(tokens, per_token), nothing, nothing)
    grad_y, x, scores, gates = (t.contiguous() for t in (grad_y, x, scores, gates))
    ends, order = torch.empty(active, dtype=torch.int64), torch.empty(tokens * top_k, dtype=torch.int64)
    library().meft_picks_of_rows(
        *(tokens * top_k, active),
        address(selection.picks, torch.int64),
        address(selection.valid, torch.bool),
        *(address(result, torch.int64) for result in (ends, order)),
    )
    ids = torch.arange(active) if values.places is None else values.places
    grad_z, grad_scores = torch.zeros(tokens, top_k), torch.zeros(tokens, top_k)
    grad_values, grad_keys = room(active, width), room(active, width)
    value_norms, key_norms = (torch.empty(active, dtype=torch.float64) for _ in range(2))
    library().meft_row_gradients(
        *(active, top_k, per_token, width),
        *(address(given, torch.int64) for given in (ends, order, ids)),
        *_table(values.table),
        *(address(given, torch.float32) for given in (grad_y, x, scores, gates)),
        address(selection.slots, torch.int64),
        *(address(result, torch.float32) for result in (grad_z, grad_scores, grad_values)),
        address(value_norms, torch.float64),
        address(grad_keys, torch.float32),
        address(key_norms, torch.float64),
        torch.get_num_threads(),
    )
    found = PickGradients(
        x=combine_rows(grad_scores, keys, selection),
        gates=torch.zeros_like(gates).scatter_add_(1, selection.slots, grad_z * scores),
        values=grad_values,
        keys=grad_keys,
        squared_norms=(value_norms, key_norms),
    )
    return found if places is None else sparse.placed(found, places)


picked_gates = sparse.picked_gates
gates_of = sparse.gates_of


def _largest(scores: Tensor, k: int) -> Tensor:
    """[T, k] int64, ascending: places of the k largest of each line [T, m]; ties to the lowest, NaN last."""
    lines, count = scores.shape
    scores, places = scores.float().contiguous(), torch.empty(lines, k, dtype=torch.int64)
    library().meft_largest(
        *(lines, count, k),
        address(scores, torch.float32),
        address(places, torch.int64),
        torch.get_num_threads(),
    )
    return places


def _ids(rows: RowsAt, selection: Selection) -> Tensor:
    """[T, K] int64: where the picks are in the table."""
    return selection.picks if rows.places is None else rows.places[selection.picks]


def _table(table: Tensor) -> tuple[int, int]:
    """Where it lies, and whether it is in bfloat16."""
    assert table.dtype in (torch.bfloat16, torch.float32), table.dtype
    return address(table, table.dtype), int(table.dtype == torch.bfloat16)
