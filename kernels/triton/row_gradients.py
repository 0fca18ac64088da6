"""Gradients of the active rows, summed over the tokens that picked them, into slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import block
from meft_kernels.triton.compact import ActiveRows


@triton.jit
def row_gradients_kernel(
    GRAD_Y,
    H,
    CENTER,
    ACTIVATIONS,
    GRAD_SCORES,
    ORDER,
    STARTS,
    ENDS,
    COUNT,
    SLOTS,
    FRESH,
    VALUES,
    KEYS,
    slots,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    position = tl.program_id(0)
    if position < tl.load(COUNT):
        slot = tl.load(SLOTS + position).to(tl.int64)
        # A row for which there was no slot must not fall into somebody else's.
        if (slot >= 0) & (slot < slots):
            column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            inside = column < WIDTH
            value, key = tl.zeros((BLOCK_WIDTH,), tl.float32), tl.zeros((BLOCK_WIDTH,), tl.float32)
            total = tl.zeros((BLOCK_PICKS,), tl.float32)
            end = tl.load(ENDS + position)
            for start in range(tl.load(STARTS + position), end, BLOCK_PICKS):
                at = start + tl.arange(0, BLOCK_PICKS)
                present = at < end
                pick = tl.load(ORDER + at, mask=present, other=0)
                activation = tl.load(ACTIVATIONS + pick, mask=present, other=0.0)
                grad_score = tl.load(GRAD_SCORES + pick, mask=present, other=0.0)
                of_token = (pick // TOP_K).to(tl.int64)[:, None] * WIDTH + column[None, :]
                both = present[:, None] & inside[None, :]
                grad_y = tl.load(GRAD_Y + of_token, mask=both, other=0.0).to(tl.float32)
                value += tl.sum(grad_y * activation[:, None], 0)
                key += tl.sum(tl.load(H + of_token, mask=both, other=0.0).to(tl.float32) * grad_score[:, None], 0)
                total += grad_score
            if CENTERED:
                key -= tl.sum(total, 0) * tl.load(CENTER + column, mask=inside, other=0.0)
            of_slot = slot * WIDTH + column
            if tl.load(FRESH + position) == 0:
                value += tl.load(VALUES + of_slot, mask=inside, other=0.0)
                key += tl.load(KEYS + of_slot, mask=inside, other=0.0)
            tl.store(VALUES + of_slot, value, mask=inside)
            tl.store(KEYS + of_slot, key, mask=inside)


def row_gradients(
    grad_y: Tensor,
    h: Tensor,
    activations: Tensor,
    grad_scores: Tensor,
    active: ActiveRows,
    values: Tensor,
    keys: Tensor,
    slots: Tensor,
    fresh: Tensor,
    *,
    center: Tensor | None = None,
) -> None:
    """``Σ_t z_tj ∂y_t`` and ``Σ_t ∂s_tj (h_t − center)`` over the tokens t that picked row j, put into a slot or added
    to what is there. Sums are over a row's tokens in their order.

    Reads T · K tokens' gradients and inputs, most of them from cache; writes 8 · U · d bytes, and reads as many where
    it adds.

    Args:
        grad_y, h: [T, d] of any float dtype. activations, grad_scores: [T, K] float32.
        values, keys: [S, d] float32: the slots of both tables' gradients, changed in place.
        slots: [U'] int32: the slot of each active row, no two equal; rows of slot −1 are left out.
        fresh: [U'] int32: 1 where a slot holds nothing yet, 0 where it is added to.
        center: [d] float32, which was subtracted from h.
    """
    most, width, top_k = active.rows.shape[0], values.shape[1], activations.shape[1]
    if most:
        block_width = block(width, 256, 16)
        row_gradients_kernel[(most, triton.cdiv(width, block_width))](
            grad_y.contiguous(),
            h.contiguous(),
            h if center is None else center,
            activations,
            grad_scores,
            active.order,
            active.starts,
            active.ends,
            active.count,
            slots,
            fresh,
            values,
            keys,
            values.shape[0],
            WIDTH=width,
            TOP_K=top_k,
            CENTERED=center is not None,
            BLOCK_PICKS=8,
            BLOCK_WIDTH=block_width,
            num_warps=4,
        )
