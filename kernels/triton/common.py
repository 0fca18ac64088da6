"""What the kernels share: total orders, products in fp32, and where they run.

Indices are int32 inside (a table has fewer than 2³¹ rows) but for offsets into memory, which are int64.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU; Triton too reads this once, as kernels are defined."""

LEAST = tl.constexpr(-(2**63))
"""Below every code that :func:`ranked` gives."""
_NAN = tl.constexpr(-(2**31))


def arithmetic(x: torch.Tensor, rows: torch.Tensor, *, centered: bool) -> str:
    """How :func:`multiply` forms products of ``x`` with ``rows`` that are right to fp32's last bits or nearly.

    - ``bf16``: both are bf16 (or int8 rows, which bf16 holds exactly): tensor cores multiply exactly, sums are fp32;
    - ``split``: x in fp32 (inputs that were centered, too) as the sum of two bf16, which keeps 16 bits of 24;
    - ``tf32x3``: both in fp32, on tensor cores that split them likewise;
    - ``ieee``: no tensor cores; what the interpreter must have, whose bf16 is wrong, and AMD.
    """
    if INTERPRETED:
        return "ieee"
    if rows.dtype in (torch.bfloat16, torch.int8):
        return "bf16" if x.dtype == torch.bfloat16 and not centered else "split"
    return "tf32x3" if torch.version.hip is None else "ieee"


def block(size: int, most: int, least: int = 1) -> int:
    """The power of two that covers ``size``, within ``least`` and ``most``."""
    return min(most, max(least, triton.next_power_of_2(size)))


@triton.jit
def sortable(x):
    """fp32 as int32 of the same order; −0 equals 0, and NaN is the least."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN)


@triton.jit
def ranked(x, place):
    """int64 codes that order by x (fp32), and where that is equal by the lower place (int32); no two are equal."""
    return (sortable(x).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def place_of(code):
    """The place (int32) that a code of :func:`ranked` was made with."""
    return 0x7FFFFFFF - (code & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def multiply(x, rows, total, ARITHMETIC: tl.constexpr):
    """total [M, N] fp32 + x [M, K] · rows [K, N]; see :func:`arithmetic`."""
    if ARITHMETIC == "bf16":
        return tl.dot(x.to(tl.bfloat16), rows.to(tl.bfloat16), total)
    elif ARITHMETIC == "split":
        x = x.to(tl.float32)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        # Of an infinity the rest would be NaN.
        low = tl.where(rest == rest, rest, 0.0).to(tl.bfloat16)
        rows = rows.to(tl.bfloat16)
        return tl.dot(high, rows, tl.dot(low, rows, total))
    else:
        return tl.dot(x.to(tl.float32), rows.to(tl.float32), total, input_precision=ARITHMETIC)


@triton.jit
def products(
    H,
    CENTER,
    ROWS,
    token,
    real,
    row,
    present,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """[M, N] fp32: ``(h − center) · row`` of tokens [M] of H and rows [N] of ROWS; nothing is read where ``real`` [M]
    or ``present`` [N] is false."""
    total = tl.zeros((token.shape[0], row.shape[0]), tl.float32)
    of_token = H + token[:, None].to(tl.int64) * WIDTH
    of_row = ROWS + row[None, :].to(tl.int64) * WIDTH
    for start in range(0, WIDTH, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        inside = column < WIDTH
        x = tl.load(of_token + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if CENTERED:
            x = x.to(tl.float32) - tl.load(CENTER + column, mask=inside, other=0.0)[None, :]
        rows = tl.load(of_row + column[:, None], mask=present[None, :] & inside[:, None], other=0)
        total = multiply(x, rows, total, ARITHMETIC)
    return total
