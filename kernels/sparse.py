"""The sparse PyTorch path of the adapter: memory follows the picks and the active rows, never T × r.

It runs on any device; ``reference.py`` is what it must equal. A token's picks are held in a padded [T, K] table, so
that "a token combines its K rows" is an embedding bag, and "a row sums over its tokens" is the transposed bag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_kernels.quantized import QuantizedRows

# Elements of a temporary block: large enough to amortise a call, small enough to stay in a CPU's last-level cache.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Selection:
    """The discrete outcome of routing: everything that a recomputation must replay rather than choose again."""

    experts: Tensor
    """[T, n] int64: each token's experts, ascending."""
    active: Tensor
    """[U] int64: the rows that any token uses, ascending."""
    picks: Tensor
    """[T, K] int64: each token's rows as positions in ``active``; 0 where ``valid`` is false."""
    slots: Tensor
    """[T, K] int64: which of the token's n experts a pick belongs to; 0 where ``valid`` is false."""
    valid: Tensor
    """[T, K] bool: false where a token has fewer than K positive activations, or the cap dropped the row."""
    count: Tensor | None = None
    """[1] int32: U, where only the device knows it; then ``active`` has more elements, those from U on some rows or
    other."""

    @property
    def number(self) -> Tensor | int:
        """U."""
        return self.active.numel() if self.count is None else self.count[0]


class Inputs(NamedTuple):
    """What the adapter reads of a micro-batch, as :func:`inputs` gives it: h − center."""

    h: Tensor
    """[T, d] of any float dtype."""
    center: Tensor | None
    """[d] float32; ``None``: nothing is subtracted."""

    @property
    def x(self) -> Tensor:
        """[T, d] float32: the difference."""
        return self.h.float() if self.center is None else self.h.float() - self.center


class Chosen(NamedTuple):
    """The experts of each token."""

    experts: Tensor
    """[T, n] int64, ascending."""
    gates: Tensor
    """[T, n] float32; NaN where the expert's logit is, which is never used."""
    counts: Tensor
    """[N] of an integer dtype: how many tokens chose an expert."""
    logits: Tensor | None
    """[T, N] float32, where they are there in any case."""


class RowsAt(NamedTuple):
    """The active rows of a selection, where they lie."""

    table: Tensor | QuantizedRows
    """[m, d] float32 or bfloat16, or in 8 bits."""
    places: Tensor | None
    """[U] int64: of each active row in ``table``; ``None``: they stand there in their order."""

    def brought(self) -> Tensor:
        """[U, d] float32: the rows themselves."""
        return (self.table if self.places is None else self.table.index_select(0, self.places)).float()

    def unquantized(self) -> RowsAt:
        """The same, for who cannot read 8 bits."""
        return RowsAt(self.brought(), None) if isinstance(self.table, QuantizedRows) else self


@dataclass(frozen=True)
class GradientPlaces:
    """Where gradients of active rows go: to slots, in which they are added up, or to the caller."""

    values: Tensor
    """[S, d] float32: the slots, changed in place."""
    keys: Tensor
    """[S, d] float32."""
    slots: Tensor
    """[U'] int32: of each active row; −1 if it has none."""
    fresh: Tensor
    """[U'] int32: 1 where a slot holds nothing yet."""
    rest: Tensor
    """[U'] int32: which of the rows without a slot it is; −1 if it has one."""
    rows: Tensor
    """[U'] int64: the rows without a slot, of which there are ``count``."""
    count: Tensor
    """[1] int32."""


class PickGradients(NamedTuple):
    """What the gradient of the output makes of everything before it."""

    x: Tensor
    """[T, d]."""
    gates: Tensor
    """[T, n]."""
    values: Tensor
    """[U, d]: of the active rows."""
    keys: Tensor
    """[U, d]."""
    squared_norms: tuple[Tensor, Tensor] | None = None
    """[U] float64 each: of the rows of ``values`` and ``keys``, where they cost no further pass."""


@dataclass(frozen=True)
class Overflow:
    """What the cap did to one micro-batch in one layer."""

    wanted_rows: Tensor | int
    """Rows that the tokens picked, before the cap; a scalar on the device where the host would have to wait for it."""
    mass: Tensor
    """Scalar: total activation of all picks."""
    kept_mass: Tensor
    """Scalar: total activation of the picks that were kept."""


def inputs(h: Tensor, center: Tensor | None) -> Inputs:
    """What these passes read: h [T, d] of any float dtype less the center [d] float32, subtracted once and for all."""
    return Inputs(Inputs(h, center).x, None)


def choose_experts(
    given: Inputs,
    router: Tensor,
    experts_per_token: int,
    gate: str,
    bias: Tensor | None,
    largest: Callable[[Tensor, int], Tensor] | None = None,
) -> Chosen:
    """Each token's n experts of largest logit, and their gates.

    Args:
        router: [N, d] of any float dtype. gate: ``softmax`` (over the n, times n), ``sigmoid`` or ``none``.
        bias: [N], added to the logits for the choice but not for the gates. largest: in place of :func:`route`.
    """
    logits = logits_of(given, router)
    experts = (largest or route)(logits if bias is None else logits + bias, experts_per_token)
    chosen = logits.gather(1, experts)
    gates = torch.where(chosen.isnan(), chosen, gates_of(chosen, gate))
    return Chosen(experts, gates, torch.bincount(experts.flatten(), minlength=router.shape[0]), logits)


def logits_of(given: Inputs, router: Tensor) -> Tensor:
    """[T, N] float32: the router's logits."""
    return F.linear(given.x, router.float())


def choose_rows(
    given: Inputs, keys: Tensor | QuantizedRows, chosen: Chosen, *, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """The rows of a micro-batch among those of its tokens' experts: what :func:`select` makes of their scores.

    Args:
        keys: [r, d]. top_k: K. cap: most active rows or ``None``.
    """
    scores = score_experts(given.x, keys, chosen.experts, chosen.counts.shape[0])
    return select(chosen.experts, chosen.gates, scores, rows=keys.shape[0], top_k=top_k, cap=cap)


def gates_of(logits: Tensor, gate: str) -> Tensor:
    """Factor of each chosen expert from its logits [T, n]: softmax times n, sigmoid, or ones."""
    if gate == "softmax":
        return torch.softmax(logits, dim=-1) * logits.shape[-1]
    return torch.sigmoid(logits) if gate == "sigmoid" else torch.ones_like(logits)


def logit_gradients(chosen: Tensor, gates: Tensor, gate: str, grad_gates: Tensor, num_experts: int) -> Tensor:
    """[T, N]: the gradient of the router's logits by that of the gates [T, n] of the chosen experts [T, n]."""
    if gate == "softmax":
        # In double, and of a sum of exactly 1: near it fp32 would leave nothing of what is subtracted.
        share, wide = gates.double(), grad_gates.double()
        share = share / share.sum(-1, keepdim=True)
        grad = (share * (wide - (wide * share).sum(-1, keepdim=True)) * gates.shape[1]).float()
    elif gate == "sigmoid":
        grad = grad_gates * gates * (1 - gates)
    else:
        grad = torch.zeros_like(gates)
    return grad.new_zeros(grad.shape[0], num_experts).scatter_(1, chosen, grad)


def route(logits: Tensor, experts_per_token: int) -> Tensor:
    """[T, n] int64, ascending: the n experts of largest logit [T, N]; ties to the lowest id, NaN last."""
    return _largest(logits, experts_per_token).sort(dim=-1).values


def score_experts(h: Tensor, keys: Tensor | QuantizedRows, experts: Tensor, num_experts: int) -> Tensor:
    """Raw scores ``h · key`` of the rows of each token's experts, one small GEMM an expert.

    Args:
        h: [T, d] float32; keys: [r, d] any float dtype, or in 8 bits; experts: [T, n].

    Returns:
        [T, n, E] float32.
    """
    tokens, per_token = experts.shape
    expert_rows = keys.shape[0] // num_experts
    order = experts.flatten().argsort(stable=True)
    inputs = h[order // per_token]
    scores = h.new_empty(tokens * per_token, expert_rows)
    start = 0
    for expert, count in enumerate(torch.bincount(experts.flatten(), minlength=num_experts).tolist()):
        if count:
            block = keys[expert * expert_rows : (expert + 1) * expert_rows].to(h.dtype)
            torch.mm(inputs[start : start + count], block.T, out=scores[start : start + count])
            start += count
    result = torch.empty_like(scores)
    result[order] = scores
    return result.view(tokens, per_token, expert_rows)


def select(
    experts: Tensor, gates: Tensor, scores: Tensor, *, rows: int, top_k: int, cap: int | None
) -> tuple[Selection, Tensor, Overflow]:
    """Choose each token's rows and the micro-batch's active rows.

    Args:
        experts: [T, n]; gates: [T, n] float32, of which NaN is never used; scores: [T, n, E] float32 raw scores;
        rows: r; cap: most active rows or ``None``.

    Returns:
        The selection; the raw scores of its picks [T, K] (0 where invalid); what the cap did.
    """
    tokens, per_token, expert_rows = scores.shape
    top_k = min(top_k, per_token * expert_rows)
    activations = (gates[:, :, None] * scores).view(tokens, per_token * expert_rows)
    # Candidates stand in the order of their row ids (experts are ascending), so "lowest position" is "lowest id".
    position = _largest(activations, top_k).sort(dim=-1).values
    kept = activations.gather(1, position)
    valid = kept > 0
    slots = torch.where(valid, position // expert_rows, 0)
    row_ids = experts.gather(1, slots) * expert_rows + position % expert_rows

    flat_rows, flat_mass = row_ids[valid], kept[valid]
    mass = torch.zeros(rows, dtype=kept.dtype, device=kept.device).index_add_(0, flat_rows, flat_mass)
    picked = torch.zeros(rows, dtype=torch.bool, device=kept.device)
    picked[flat_rows] = True
    active = picked.nonzero().flatten()
    wanted, total = active.numel(), mass.sum()
    kept_mass = total
    if cap is not None and wanted > cap:
        active = active[_largest(mass[active][None], cap)[0]].sort().values
        picked = torch.zeros_like(picked)
        picked[active] = True
        valid = valid & picked[row_ids]
        kept_mass = mass[active].sum()
    position_of_row = torch.zeros(rows, dtype=torch.int64, device=kept.device)
    position_of_row[active] = torch.arange(active.numel(), device=kept.device)

    raw = scores.view(tokens, per_token * expert_rows).gather(1, position)
    selection = Selection(
        experts=experts,
        active=active,
        picks=torch.where(valid, position_of_row[row_ids], 0),
        slots=torch.where(valid, slots, 0),
        valid=valid,
    )
    return selection, torch.where(valid, raw, 0), Overflow(wanted, total, kept_mass)


def score_picks(x: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """[T, K]: dot product of each token's ``x`` [T, d] with the rows that it picked; 0 if invalid."""
    return _score_picks(x, rows.brought(), selection)


def combine_rows(weights: Tensor, rows: RowsAt, selection: Selection) -> Tensor:
    """[T, d]: each token's sum of the rows that it picked, by its ``weights`` [T, K]."""
    return _combine_rows(weights, rows.brought(), selection)


def picked_gates(gates: Tensor, selection: Selection) -> Tensor:
    """[T, K]: the gate of each pick's expert; 0 where there is no pick, since a NaN gate times 0 would be NaN."""
    return torch.where(selection.valid, gates.gather(1, selection.slots), 0)


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
    """The way back through ``y_t = Σ_j z_tj B_j``, where ``z_tj = gate · (x_t · A_j)``, over the picks j of token t.

    Args:
        grad_y: [T, d] of any float dtype; scores: [T, K] float32, raw ``x · A_j``; gates: [T, n] float32.
        room: gives memory for the rows' gradients to those passes that can choose theirs, which these are not.
        places: where rows' gradients go; those returned are then of the rows without a slot. ``None``: none has one.
    """
    x, grad_y = given.x, grad_y.float()
    of_picks = picked_gates(gates, selection)
    tokens_of_row = _TokensOfRow(selection)
    grad_z = _score_picks(grad_y, values.brought(), selection)
    grad_scores = grad_z * of_picks
    found = PickGradients(
        x=_combine_rows(grad_scores, keys.brought(), selection),
        gates=torch.zeros_like(gates).scatter_add_(1, selection.slots, grad_z * scores),
        values=tokens_of_row.combine(scores * of_picks, grad_y),
        keys=tokens_of_row.combine(grad_scores, x),
    )
    return found if places is None else placed(found, places)


def placed(found: PickGradients, places: GradientPlaces) -> PickGradients:
    """Put gradients of rows into their slots, and return those of rows that have none; waits for the device."""
    held, rest = (places.slots >= 0).nonzero().flatten(), (places.rest >= 0).nonzero().flatten()
    fresh = places.fresh[held] > 0
    for grad, slots in ((found.values, places.values), (found.keys, places.keys)):
        into = places.slots[held].long()
        slots[into] = torch.where(fresh[:, None], grad[held], slots[into] + grad[held])
    norms = found.squared_norms and tuple(of_rows[rest] for of_rows in found.squared_norms)
    return found._replace(values=found.values[rest], keys=found.keys[rest], squared_norms=norms)


def _score_picks(x: Tensor, table: Tensor, selection: Selection) -> Tensor:
    tokens, top_k = selection.picks.shape
    dots = x.new_zeros(tokens, top_k)
    if not table.shape[0]:
        return dots
    step = max(1, _BLOCK_ELEMENTS // max(1, top_k * x.shape[1]))
    for start in range(0, tokens, step):
        chunk = slice(start, start + step)
        torch.bmm(table[selection.picks[chunk]], x[chunk, :, None], out=dots[chunk, :, None])
    return torch.where(selection.valid, dots, 0)


def _combine_rows(weights: Tensor, table: Tensor, selection: Selection) -> Tensor:
    if not table.shape[0]:
        return table.new_zeros(weights.shape[0], table.shape[1])
    return F.embedding_bag(selection.picks, table, per_sample_weights=weights, mode="sum")


class _TokensOfRow:
    """The transpose of a selection: for each active row, the tokens that picked it."""

    def __init__(self, selection: Selection) -> None:
        self._valid = selection.valid
        rows = selection.picks[selection.valid]
        self._order = rows.argsort(stable=True)
        tokens = torch.arange(selection.picks.shape[0], device=rows.device)[:, None].expand_as(selection.picks)
        self._tokens = tokens[selection.valid][self._order]
        counts = torch.bincount(rows, minlength=selection.active.numel())
        self._offsets = counts.cumsum(0) - counts

    def combine(self, weights: Tensor, x: Tensor) -> Tensor:
        """[U, d]: each active row's sum of its tokens' ``x`` [T, d], by ``weights`` [T, K]."""
        if not self._offsets.numel():
            return x.new_zeros(0, x.shape[1])
        weights = weights[self._valid][self._order]
        return F.embedding_bag(self._tokens, x, self._offsets, per_sample_weights=weights, mode="sum")


def _largest(scores: Tensor, k: int) -> Tensor:
    """[T, k]: positions of the k largest of each row of ``scores`` [T, m]; ties to the lowest position, NaN last.

    ``torch.topk`` leaves ties open, so scores and positions are packed into one integer whose order is total: the
    float's bits, made monotone, above the inverted position.
    """
    bits = torch.where(scores == 0, 0.0, scores.float()).contiguous().view(torch.int32)
    monotone = torch.where(scores.isnan(), torch.iinfo(torch.int32).min, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    position = torch.arange(scores.shape[-1], device=scores.device)
    packed = (monotone.long() << 32) | (0xFFFFFFFF - position)
    return packed.topk(k, dim=-1).indices
