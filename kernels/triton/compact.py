"""The rows that a micro-batch activates, ascending, with the picks of each, and where each pick's row is among them.

Nothing here has as many elements as the table has rows, so r may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@dataclass(frozen=True)
class ActiveRows:
    """The active rows of a micro-batch. Only the device knows how many they are; arrays have room for the most."""

    rows: Tensor
    """[U'] int32: their ids, ascending, and then some row or other."""
    count: Tensor
    """[1] int32: U."""
    starts: Tensor
    ends: Tensor
    """[U'] int32: the picks of a row are ``order[start:end]``."""
    order: Tensor
    """[T · K] int32: the picks (``token · K + place``) by rows, and of a row by tokens; those of no row last."""
    positions: Tensor
    """[T, K] int64: of each pick's row among ``rows``; 0 where ``valid`` is false."""
    valid: Tensor
    """[T, K] bool."""


@triton.jit
def _is_head(IDS, at, picks, rows):
    """Whether a row's picks begin at these places of the sorted ids, and the row."""
    inside = at < picks
    row = tl.load(IDS + at, mask=inside, other=rows)
    before = tl.load(IDS + at - 1, mask=inside & (at > 0), other=-1)
    return (inside & (row < rows) & (row != before)).to(tl.int32), row


@triton.jit
def heads_kernel(IDS, HEADS, picks, rows, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, _ = _is_head(IDS, at, picks, rows)
    tl.store(HEADS + tl.program_id(0), tl.sum(head, 0))


@triton.jit
def compact_kernel(
    IDS,
    ORDER,
    HEADS,
    ROWS,
    STARTS,
    ENDS,
    COUNT,
    POSITIONS,
    VALID,
    picks,
    rows,
    BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    block = tl.program_id(0)
    earlier = tl.zeros((BLOCK_HEADS,), tl.int32)
    for first in range(0, block, BLOCK_HEADS):
        other = first + tl.arange(0, BLOCK_HEADS)
        earlier += tl.load(HEADS + other, mask=other < block, other=0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    head, row = _is_head(IDS, at, picks, rows)
    position = tl.sum(earlier, 0) + tl.cumsum(head, 0) - 1
    inside = at < picks
    picked = inside & (row < rows)
    pick = tl.load(ORDER + at, mask=inside, other=0)
    tl.store(ROWS + position, row, mask=head > 0)
    tl.store(STARTS + position, at, mask=head > 0)
    tl.store(POSITIONS + pick, tl.where(picked, position, 0).to(tl.int64), mask=inside)
    tl.store(VALID + pick, picked, mask=inside)
    # Where a row ends the next begins, or what is no pick, or nothing.
    after = tl.load(IDS + at + 1, mask=at + 1 < picks, other=rows)
    tl.store(ENDS + position, at + 1, mask=picked & (after != row))
    tl.store(COUNT + tl.zeros((BLOCK,), tl.int32), position + 1, mask=picked & (after >= rows))


def compact(ids: Tensor, rows: int) -> ActiveRows:
    """The distinct rows among the picks, and each one's picks.

    Picks are sorted by torch (stably, so that sums over a row's picks have one order); two launches read them twice
    and write 21 bytes each.

    Args:
        ids: [T, K] int32: row ids, ``rows`` where there is no pick. rows: r.
    """
    picks, device = ids.numel(), ids.device
    most = min(rows, picks)
    found, order = ids.flatten().sort(stable=True)
    active = ActiveRows(
        rows=torch.zeros(most, dtype=torch.int32, device=device),
        count=torch.zeros(1, dtype=torch.int32, device=device),
        starts=torch.empty(most, dtype=torch.int32, device=device),
        ends=torch.empty(most, dtype=torch.int32, device=device),
        order=order.int(),
        positions=torch.empty(ids.shape, dtype=torch.int64, device=device),
        valid=torch.empty(ids.shape, dtype=torch.bool, device=device),
    )
    if picks:
        blocks = triton.cdiv(picks, _BLOCK)
        heads = torch.empty(blocks, dtype=torch.int32, device=device)
        heads_kernel[(blocks,)](found, heads, picks, rows, BLOCK=_BLOCK, num_warps=4)
        compact_kernel[(blocks,)](
            found,
            active.order,
            heads,
            active.rows,
            active.starts,
            active.ends,
            active.count,
            active.positions,
            active.valid,
            picks,
            rows,
            BLOCK=_BLOCK,
            BLOCK_HEADS=256,
            num_warps=4,
        )
    return active
