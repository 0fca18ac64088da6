"""A token's sum of the rows that it picked: the down-projection, and the gradient of its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import block


@triton.jit
def combine_kernel(
    WEIGHTS,
    PICKS,
    VALID,
    TABLE,
    SCALES,
    PLACES,
    ONTO,
    OUT,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACED: tl.constexpr,
    SCALED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < WIDTH
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for start in range(0, TOP_K, BLOCK_PICKS):
        place = start + tl.arange(0, BLOCK_PICKS)
        pick = token * TOP_K + place
        valid = tl.load(VALID + pick, mask=place < TOP_K, other=0).to(tl.int32) > 0
        weight = tl.load(WEIGHTS + pick, mask=valid, other=0.0)
        row = tl.load(PICKS + pick, mask=valid, other=0)
        if PLACED:
            row = tl.load(PLACES + row, mask=valid, other=0).to(tl.int64)
        if SCALED:
            weight *= tl.load(SCALES + row, mask=valid, other=0.0)
        at = TABLE + row[:, None] * WIDTH + column[None, :]
        rows = tl.load(at, mask=valid[:, None] & inside[None, :], other=0).to(tl.float32)
        total += tl.sum(rows * weight[:, None], 0)
    if ADDED:
        total += tl.load(ONTO + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + token * WIDTH + column, total.to(OUT.dtype.element_ty), mask=inside)


def combine(
    weights: Tensor,
    picks: Tensor,
    valid: Tensor,
    table: Tensor,
    *,
    places: Tensor | None = None,
    scales: Tensor | None = None,
    onto: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``Σ_j weight_tj · row_tj`` over the picks j of token t, added to ``onto``. Rows are read only where there are
    picks, so the number of active rows stays on the device.

    Reads T · K rows, most of them from cache, and ``onto``; writes T rows.

    Args:
        weights: [T, K] float32. picks: [T, K] int64: positions, where ``valid`` [T, K] (bool) says.
        table: [m, d] float32, bfloat16, or int8 with ``scales`` [m] float32. places: [U] of each position in the table
            (int32 or int64); ``None``: positions are places.
        onto: [T, d] of any float dtype. dtype: of the result.

    Returns:
        [T, d], rounded once from float32.
    """
    (tokens, top_k), width = picks.shape, table.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=weights.device)
    if tokens:
        block_width = block(width, 512, 16)
        combine_kernel[(tokens, triton.cdiv(width, block_width))](
            weights.contiguous(),
            picks,
            valid,
            table,
            weights if scales is None else scales,
            picks if places is None else places,
            out if onto is None else onto.contiguous(),
            out,
            WIDTH=width,
            TOP_K=top_k,
            PLACED=places is not None,
            SCALED=scales is not None,
            ADDED=onto is not None,
            BLOCK_PICKS=block(top_k, 8),
            BLOCK_WIDTH=block_width,
            num_warps=4,
        )
    return out
