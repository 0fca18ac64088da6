"""Scores of the rows of each token's experts: as many GEMMs as experts, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import arithmetic, block, products


@triton.jit
def score_kernel(
    H,
    CENTER,
    KEYS,
    SCALES,
    PAIRS,
    COUNTS,
    SCORES,
    num_experts,
    WIDTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    CENTERED: tl.constexpr,
    SCALED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # Tiles of BLOCK_PAIRS pairs are numbered through all experts; the launch has as many as there could be.
    tile = tl.program_id(0)
    experts = tl.arange(0, PADDED_EXPERTS)
    counts = tl.load(COUNTS + experts, mask=experts < num_experts, other=0)
    tiles = (counts + BLOCK_PAIRS - 1) // BLOCK_PAIRS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert < num_experts:
        earlier = experts < expert
        count = tl.sum(tl.where(experts == expert, counts, 0), 0)
        place = (tile - tl.sum(tl.where(earlier, tiles, 0), 0)) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
        real = place < count
        pair = tl.load(PAIRS + tl.sum(tl.where(earlier, counts, 0), 0) + place, mask=real, other=0)
        of_expert = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        present = of_expert < EXPERT_ROWS
        row = expert * EXPERT_ROWS + of_expert
        scores = products(
            H, CENTER, KEYS, pair // PER_TOKEN, real, row, present, WIDTH, CENTERED, ARITHMETIC, BLOCK_WIDTH
        )
        if SCALED:
            scores *= tl.load(SCALES + row, mask=present, other=0.0)[None, :]
        at = pair[:, None].to(tl.int64) * EXPERT_ROWS + of_expert[None, :]
        tl.store(SCORES + at, scores, mask=real[:, None] & present[None, :])


def score(
    h: Tensor,
    keys: Tensor,
    experts: Tensor,
    counts: Tensor,
    pairs: Tensor,
    *,
    scales: Tensor | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """Raw scores ``(h − center) · A_j`` of the rows of each token's experts.

    Reads each chosen expert's keys once for every 64 tokens that chose it, and a token n times (both mostly from
    cache); writes 4 · T · n · E bytes. 2 · T · n · E · d FLOPs, twice that with inputs in fp32.

    Args:
        h: [T, d] bfloat16 or float32. keys: [r, d] bfloat16, float32, or int8 with ``scales`` [r] float32.
        experts: [T, n] int64; counts: [N] int32; pairs: [T · n] int32, as ``expert_lists`` gives them.
        center: [d] float32, subtracted from h.

    Returns:
        [T, n, E] float32.
    """
    (tokens, per_token), (rows, width) = experts.shape, keys.shape
    num_experts = counts.shape[0]
    expert_rows = rows // num_experts
    h = h.contiguous()
    scores = torch.empty(tokens, per_token, expert_rows, device=h.device)
    if tokens:
        block_pairs, block_rows = 64, block(expert_rows, 128, 16)
        most_tiles = triton.cdiv(pairs.numel(), block_pairs) + min(num_experts, pairs.numel())
        score_kernel[(most_tiles, triton.cdiv(expert_rows, block_rows))](
            h,
            h if center is None else center,
            keys,
            h if scales is None else scales,
            pairs,
            counts,
            scores,
            num_experts,
            WIDTH=width,
            PER_TOKEN=per_token,
            EXPERT_ROWS=expert_rows,
            PADDED_EXPERTS=triton.next_power_of_2(num_experts),
            CENTERED=center is not None,
            SCALED=scales is not None,
            ARITHMETIC=arithmetic(h, keys, centered=center is not None),
            BLOCK_PAIRS=block_pairs,
            BLOCK_ROWS=block_rows,
            # What is in fp32 takes twice the room, and more registers where it is split.
            BLOCK_WIDTH=block(width, 64 if keys.element_size() < 4 else 32, 16),
            num_warps=8,
        )
    return scores
