"""Gradients of rows from device slots into accumulators in pinned host memory, which the device writes in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import block


@triton.jit
def return_gradients_kernel(
    GRADIENTS,
    TOTAL,
    SLOTS,
    ROWS,
    FRESH,
    COUNT,
    num_slots,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    for at in range(tl.program_id(0), tl.load(COUNT), tl.num_programs(0)):
        slot = tl.load(SLOTS + at).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            row = tl.load(ROWS + at).to(tl.int64)
            old = tl.load(FRESH + at) == 0
            for start in range(0, WIDTH, BLOCK_WIDTH):
                column = start + tl.arange(0, BLOCK_WIDTH)
                inside = column < WIDTH
                total = tl.load(GRADIENTS + slot * WIDTH + column, mask=inside, other=0.0)
                if old:
                    total += tl.load(TOTAL + row * WIDTH + column, mask=inside, other=0.0)
                tl.store(TOTAL + row * WIDTH + column, total, mask=inside)


def return_gradients(
    gradients: Tensor, total: Tensor, slots: Tensor, rows: Tensor, fresh: Tensor, count: Tensor, *, programs: int = 16
) -> None:
    """Put the gradients of some rows into an accumulator, or add them to what it holds.

    Writes 4 · d bytes over the bus for each row, and reads as many where it adds. A row has one program: nothing is
    added atomically, and sums have the order of the calls.

    Args:
        gradients: [S, d] float32, slots on the device. total: [m, d] float32, on the device or pinned on the host.
        slots, rows: [U'] int32: where each gradient is, and where it goes; rows are distinct. Of slot −1 there is none.
        fresh: [U'] int32: 1 where the accumulator holds nothing yet. count: [1] int32.
        programs: a few saturate the bus.
    """
    width = gradients.shape[1]
    return_gradients_kernel[(programs,)](
        gradients,
        total,
        slots,
        rows,
        fresh,
        count,
        gradients.shape[0],
        WIDTH=width,
        BLOCK_WIDTH=block(width, 2048, 16),
        num_warps=4,
    )
