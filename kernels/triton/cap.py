"""The cap on active rows: those of largest mass stay, and the picks of the others are dropped."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.compact import ActiveRows
from meft_kernels.triton.select_largest import among_largest, kth_largest


@triton.jit
def mass_kernel(ACTIVATIONS, ORDER, STARTS, ENDS, COUNT, MASS, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(COUNT):
        end = tl.load(ENDS + row)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(tl.load(STARTS + row), end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            pick = tl.load(ORDER + at, mask=at < end, other=0)
            total += tl.load(ACTIVATIONS + pick, mask=at < end, other=0.0)
        tl.store(MASS + row, tl.sum(total, 0))


@triton.jit
def cap_kernel(
    MASS, ROWS, STARTS, ENDS, COUNT, KEPT_ROWS, KEPT_STARTS, KEPT_ENDS, KEPT_COUNT, MOVED, cap, BLOCK: tl.constexpr
):
    count = tl.load(COUNT)
    # Sums of positive floats, infinity included: their bits order as they do.
    threshold, ties = kth_largest(MASS, count, tl.minimum(count, cap), BLOCK)
    kept_before, ties_before = count * 0, count * 0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mass = tl.load(MASS + at, mask=at < count, other=0)
        kept, ties_before = among_largest(mass, threshold, ties, ties_before)
        place = kept_before + tl.cumsum(kept, 0) - kept
        stays = kept > 0
        tl.store(MOVED + at, tl.where(stays, place, -1), mask=at < count)
        tl.store(KEPT_ROWS + place, tl.load(ROWS + at, mask=stays, other=0), mask=stays)
        tl.store(KEPT_STARTS + place, tl.load(STARTS + at, mask=stays, other=0), mask=stays)
        tl.store(KEPT_ENDS + place, tl.load(ENDS + at, mask=stays, other=0), mask=stays)
        kept_before += tl.sum(kept, 0)
    tl.store(KEPT_COUNT, kept_before)


@triton.jit
def drop_kernel(MOVED, POSITIONS, VALID, KEPT_POSITIONS, KEPT_VALID, picks, BLOCK: tl.constexpr):
    pick = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pick < picks
    valid = tl.load(VALID + pick, mask=inside, other=0).to(tl.int32) > 0
    moved = tl.load(MOVED + tl.load(POSITIONS + pick, mask=valid, other=0), mask=valid, other=-1)
    tl.store(KEPT_POSITIONS + pick, tl.maximum(moved, 0).to(tl.int64), mask=inside)
    tl.store(KEPT_VALID + pick, moved >= 0, mask=inside)


def keep_largest(active: ActiveRows, activations: Tensor, cap: int) -> ActiveRows:
    """At most ``cap`` of the active rows: those of largest mass, the sum of a row's activations; ties to the lowest id.

    Sums have one order, so the same picks always keep the same rows. One program finds the rows, in four passes over
    the masses: 16 · U bytes from cache.

    Args:
        activations: [T, K] float32, positive where there is a pick.
    """
    most = active.rows.shape[0]
    if cap >= most:
        return active
    device, picks = activations.device, activations.numel()
    mass = torch.empty(most, device=device)
    mass_kernel[(most,)](
        activations, active.order, active.starts, active.ends, active.count, mass, BLOCK=64, num_warps=1
    )
    rows, starts, ends = (torch.zeros(cap, dtype=torch.int32, device=device) for _ in range(3))
    moved = torch.empty(most, dtype=torch.int32, device=device)
    kept = replace(
        active,
        rows=rows,
        starts=starts,
        ends=ends,
        count=torch.zeros_like(active.count),
        positions=torch.empty_like(active.positions),
        valid=torch.empty_like(active.valid),
    )
    cap_kernel[(1,)](
        mass.view(torch.int32),
        active.rows,
        active.starts,
        active.ends,
        active.count,
        rows,
        starts,
        ends,
        kept.count,
        moved,
        cap,
        BLOCK=min(4096, triton.next_power_of_2(most)),
        num_warps=8,
    )
    block = 1024
    drop_kernel[(triton.cdiv(picks, block),)](
        moved, active.positions, active.valid, kept.positions, kept.valid, picks, BLOCK=block, num_warps=4
    )
    return kept
