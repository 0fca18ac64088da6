"""AdamW over rows that the device owns, with the host's bits: the same operations in the same order, rounded apart."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.rows import AdamStep, RowTable
from meft_kernels.triton.common import block


@triton.jit
def _stochastic_bf16(x, random):
    """The bits (int16) of one of the two bf16 around x, the nearer one more often; ``random``: 0 to 0xFFFF."""
    return ((x.to(tl.int32, bitcast=True) + random) >> 16).to(tl.int16)


@triton.jit
def _mixed(x):
    """The finaliser of SplitMix64 (S. Vigna, public domain) of int64."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return (x >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["seed"])
def adam_kernel(
    HIGH,
    LOW,
    EXP_AVG,
    EXP_AVG_SQ,
    STEP,
    GRADIENTS,
    ROWS,
    IDS,
    SLOTS,
    COUNT,
    SIZES,
    ROOTS,
    INFINITE,
    grad_scale,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    seed,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    at = tl.program_id(0)
    if at < tl.load(COUNT):
        row, slot = tl.load(ROWS + at).to(tl.int64), tl.load(SLOTS + at).to(tl.int64)
        now = tl.load(STEP + row) + 1
        size, inverse_root = tl.load(SIZES + now), tl.load(ROOTS + now)
        infinite = now * 0
        if PAIRED:
            key = _mixed((tl.load(IDS + at).to(tl.int64) << 32) + now + seed)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            column = start + tl.arange(0, BLOCK_WIDTH)
            inside = column < WIDTH
            here = row * WIDTH + column
            if PLANES:
                high = tl.load(HIGH + here, mask=inside, other=0).to(tl.int32)
                low = tl.load(LOW + here, mask=inside, other=0).to(tl.int32)
                w = ((high << 16) + low).to(tl.float32, bitcast=True)
            else:
                w = tl.load(HIGH + here, mask=inside, other=0.0)
            if PAIRED:
                m = (tl.load(EXP_AVG + 2 * here, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
                v = (tl.load(EXP_AVG_SQ + 2 * here, mask=inside, other=0).to(tl.int32) << 16).to(
                    tl.float32, bitcast=True
                )
            else:
                m = tl.load(EXP_AVG + here, mask=inside, other=0.0)
                v = tl.load(EXP_AVG_SQ + here, mask=inside, other=0.0)
            g = tl.load(GRADIENTS + slot * WIDTH + column, mask=inside, other=0.0) * grad_scale
            m = m * beta1 + g * rest1
            v = v * beta2 + (g * g) * rest2
            w = w * decay - tl.div_rn(m * size, tl.sqrt_rn(v) * inverse_root + eps)
            bits = w.to(tl.int32, bitcast=True)
            if PLANES:
                nan = (bits & 0x7FFFFFFF) > 0x7F800000
                high = tl.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
                tl.store(HIGH + here, high.to(tl.int16), mask=inside)
                tl.store(LOW + here, tl.where(nan, 0, bits).to(tl.int16), mask=inside)
                bits = high << 16
            else:
                tl.store(HIGH + here, w, mask=inside)
            infinite += tl.sum((inside & ((bits & 0x7F800000) == 0x7F800000)).to(tl.int32), 0)
            if PAIRED:
                # 16 bits for each moment, from one word for a pair of columns eight apart; kernels/cpu/row_table.h.
                x = key.to(tl.uint32) + (column // 16 * 8 + column % 8).to(tl.uint32) * 0x9E3779B9
                x = (x ^ (x >> 15)) * 0xC2B2AE35
                lower, upper = (x & 0xFFFF).to(tl.int32), (x >> 16).to(tl.int32)
                swapped = column % 16 >= 8
                of_m, of_v = tl.where(swapped, upper, lower), tl.where(swapped, lower, upper)
                tl.store(EXP_AVG + 2 * here, _stochastic_bf16(m, of_m), mask=inside)
                tl.store(EXP_AVG_SQ + 2 * here, _stochastic_bf16(v, of_v), mask=inside)
            else:
                tl.store(EXP_AVG + here, m, mask=inside)
                tl.store(EXP_AVG_SQ + here, v, mask=inside)
        tl.store(STEP + row, now)
        tl.atomic_add(INFINITE, (infinite > 0).to(tl.int32), sem="relaxed")


def adam_rows(
    table: RowTable,
    rows: Tensor,
    count: Tensor,
    gradients: Tensor,
    slots: Tensor,
    step: AdamStep,
    corrections: tuple[Tensor, Tensor],
    ids: Tensor | None = None,
) -> Tensor:
    """As :func:`meft_kernels.rows.adam_rows` without idle rows to be brought to date, on the device, in place.

    Reads 4 · d bytes of gradient and reads and writes 12 · d bytes of state for each row (8 · d with bf16 moments).

    Args:
        table: on the device. rows: [U'] int32, distinct; count: [1] int32 of them.
        gradients: [S, d] float32, where ``slots`` [U'] int32 says.
        corrections: of :class:`meft_kernels.owned.BiasCorrections`, up to the largest step that a row may reach.
        ids: [U'] int32, by which random bits are drawn; ``None``: ``rows``.

    Returns:
        [1] int32: how many of the rows now have a compute copy that is infinite or NaN.
    """
    if step.now:
        raise ValueError(f"rows that the device owns count their own steps; step.now = {step.now} would be ignored")
    width, (beta1, beta2) = table.high.shape[1], step.betas
    planes, paired = table.low is not None, table.exp_avg.dtype == torch.bfloat16
    infinite = torch.zeros(1, dtype=torch.int32, device=gradients.device)
    if rows.numel():
        adam_kernel[(rows.numel(),)](
            table.high.view(torch.int16) if planes else table.high,
            table.low if planes else table.high,
            table.exp_avg.view(torch.int16) if paired else table.exp_avg,
            table.exp_avg_sq.view(torch.int16) if paired else table.exp_avg_sq,
            table.step,
            gradients,
            rows,
            rows if ids is None else ids,
            slots,
            count,
            *corrections,
            infinite,
            step.grad_scale,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            step.eps,
            step.decay,
            step.seed - (1 << 64) if step.seed >= 1 << 63 else step.seed,
            WIDTH=width,
            PLANES=planes,
            PAIRED=paired,
            BLOCK_WIDTH=block(width, 1024, 16),
            num_warps=4,
            # Products and sums rounded apart, as the host's are.
            enable_fp_fusion=False,
        )
    return infinite
