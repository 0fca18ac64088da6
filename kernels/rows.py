"""Passes over scattered rows of host tables, in PyTorch: what serves where there is no compiler.

``kernels/cpu/rows.cpp`` does the same at the speed of memory, and gives the same bits: every operation here is one that
rounds once, in the order that the C++ has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from meft_kernels.planes import join, split

# Rows are worked on in blocks of about this many elements, so that a block's temporaries stay in the cache.
_BLOCK_ELEMENTS = 1 << 17
_UINT32 = 0xFFFFFFFF


class RowTable(NamedTuple):
    """A table of r rows, d wide, as the passes see it."""

    high: Tensor
    """[r, d]: the bf16 plane of the masters, or whole float32 masters where ``low`` is None."""
    low: Tensor | None
    """[r, d] int16: the lower plane."""
    exp_avg: Tensor
    """[r, d] float32; or bfloat16, as :func:`paired_moments` gives them."""
    exp_avg_sq: Tensor
    step: Tensor
    """[r] int32: how many steps a row has behind it."""


class AdamStep(NamedTuple):
    """One AdamW step; the bias corrections of a row follow from its own number of the step."""

    grad_scale: float
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    """1 − lr · weight decay."""
    now: int = 0
    """The number of the step for all rows; 0: one more than the table says of each."""
    seed: int = 0
    """Of 64 bits, for the stochastic rounding of bf16 moments."""


class Coast(NamedTuple):
    """How rows move while they are idle: ``w = P w − m Σ a / (√v b + eps)``, ``m = M m``, ``v = V v``."""

    of_row: Tensor
    """[n] int32: which line of the coefficients is a row's."""
    coefficients: Tensor
    """[D, 3 + 2 q] float32: P, M, V, then q pairs (a, b)."""


def paired_moments(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """``exp_avg`` and ``exp_avg_sq`` [r, d] as views of bf16 pairs [r, d, 2], which take less work than two tables."""
    return pairs[..., 1], pairs[..., 0]


def adam_rows(
    table: RowTable,
    rows: Tensor,
    grad: Tensor,
    step: AdamStep,
    coast: Coast | None = None,
    *,
    threads: int = 0,
    ids: Tensor | None = None,
) -> int:
    """AdamW over the distinct ``rows`` [n] int64 with gradients ``grad`` [n, d] float32, in place.

    Args:
        coast: what idle rows go through first.
        threads: of the C++ path; PyTorch uses its own.
        ids: [n] int64, by which random bits are drawn, if the table holds rows of a larger one; ``None``: ``rows``.

    Returns:
        How many of the rows now have a compute copy that is infinite or NaN.
    """
    beta1, beta2 = step.betas
    infinite, names = 0, rows if ids is None else ids
    for part in _blocks(rows.numel(), grad.shape[1]):
        at = rows[part]
        w, m, v = _load(table, at)
        if coast is not None:
            w, m, v = _coasted(w, m, v, Coast(coast.of_row[part], coast.coefficients), step.eps)
        now = torch.full_like(table.step[at], step.now) if step.now else table.step[at] + 1
        step_size, inverse_root = _bias_corrections(step, now)
        g = grad[part] * step.grad_scale
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + (g * g) * (1 - beta2)
        w = w * step.decay - (m * step_size[:, None]) / (_root(v) * inverse_root[:, None] + step.eps)
        if table.low is None:
            table.high.index_copy_(0, at, w)
            finite = w.isfinite()
        else:
            high, low = split(w)
            table.high.index_copy_(0, at, high)
            table.low.index_copy_(0, at, low)
            finite = high.isfinite()
        infinite += int((~finite.all(1)).sum())
        if table.exp_avg.dtype == torch.bfloat16:
            for_m, for_v = _random_bits(_random_keys(step.seed, names[part], now), grad.shape[1])
            m, v = stochastic_bf16(m, for_m), stochastic_bf16(v, for_v)
        table.exp_avg.index_copy_(0, at, m)
        table.exp_avg_sq.index_copy_(0, at, v)
        table.step.index_copy_(0, at, now)
    return infinite


def read_coasted(table: RowTable, rows: Tensor, coast: Coast, eps: float, *, threads: int = 0) -> Tensor:
    """[n, d] float32: the masters of ``rows`` [n], brought to date; the table stays as it is."""
    out = torch.empty(rows.numel(), table.high.shape[1])
    for part in _blocks(rows.numel(), table.high.shape[1]):
        lines = Coast(coast.of_row[part], coast.coefficients)
        out[part] = _coasted(*_load(table, rows[part]), lines, eps)[0]
    return out


def gather_rows(high: Tensor, rows: Tensor, *, threads: int = 0) -> Tensor:
    """[n, d] float32: ``rows`` [n] of a compute copy [r, d] (bfloat16 or float32)."""
    return high.index_select(0, rows).float()


def accumulate_rows(total: Tensor, slots: Tensor, fresh: Tensor, grad: Tensor, *, threads: int = 0) -> None:
    """Put ``grad`` [n, d] into rows ``slots`` [n] of ``total``: added, or in their place where ``fresh`` [n] (bool)."""
    total[slots[fresh]] = grad[fresh]
    old = ~fresh
    total[slots[old]] = total[slots[old]] + grad[old]


def squared_norms(x: Tensor, *, threads: int = 0) -> Tensor:
    """[n] float64: the squared norm of each row of ``x`` [n, d] float32."""
    out = torch.empty(x.shape[0], dtype=torch.float64)
    for part in _blocks(x.shape[0], x.shape[1]):
        out[part] = x[part].double().square_().sum(1)
    return out


def stochastic_bf16(x: Tensor, random: Tensor) -> Tensor:
    """``x`` (float32) as one of the two bf16 around it, the nearer one more often; ``random``: int64 of 0 to 0xFFFF."""
    bits = x.view(torch.int32).long() & _UINT32
    return (((bits + random) & _UINT32) >> 16).to(torch.int16).view(torch.bfloat16)


def _bias_corrections(step: AdamStep, now: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows at the steps ``now`` [n] int32: lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ), [n] float32."""
    distinct, place = now.unique(return_inverse=True)
    # By the C library's pow, as in C++, and in float64: 1 - β₂ᵗ is 1e-3 at the first step.
    sizes = [step.lr / (1 - math.pow(step.betas[0], t)) for t in distinct.tolist()]
    roots = [1 / math.sqrt(1 - math.pow(step.betas[1], t)) for t in distinct.tolist()]
    sizes, roots = (torch.tensor(of_steps, dtype=torch.float32, device=now.device) for of_steps in (sizes, roots))
    return sizes[place], roots[place]


def _random_keys(seed: int, rows: Tensor, steps: Tensor) -> Tensor:
    """[n] int32: a hash of seed, row and step (the finaliser of SplitMix64, S. Vigna, public domain)."""
    wrapped = seed - (1 << 64) if seed >= 1 << 63 else seed
    x = (rows << 32) + steps.long() + wrapped
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x >> 32).to(torch.int32)


def _random_bits(keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """16 random bits for each moment, int64 [n, d]; ``kernels/cpu/row_table.h`` says how and why."""
    columns = torch.arange(width, device=keys.device)
    x = ((keys.long()[:, None] & _UINT32) + (columns // 16 * 8 + columns % 8) * 0x9E3779B9) & _UINT32
    x = ((x ^ (x >> 15)) * 0xC2B2AE35) & _UINT32
    low, high, swapped = x & 0xFFFF, x >> 16, columns % 16 >= 8
    return torch.where(swapped, high, low), torch.where(swapped, low, high)


def _load(table: RowTable, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = table.high.index_select(0, ids)
    w = high if table.low is None else join(high, table.low.index_select(0, ids))
    return w, table.exp_avg.index_select(0, ids).float(), table.exp_avg_sq.index_select(0, ids).float()


def _root(x: Tensor) -> Tensor:
    """√x, rounded once: torch's own float32 root may be off by a bit, for which one of float64 is too close."""
    return x.double().sqrt_().float()


def _coasted(w: Tensor, m: Tensor, v: Tensor, coast: Coast, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    lines = coast.coefficients[coast.of_row.long()]
    root, total = _root(v), torch.zeros_like(v)
    for k in range(3, lines.shape[1], 2):
        total = total + lines[:, k, None] / (root * lines[:, k + 1, None] + eps)
    return w * lines[:, 0, None] - m * total, m * lines[:, 1, None], v * lines[:, 2, None]


def _blocks(rows: int, width: int) -> list[slice]:
    block = max(1, _BLOCK_ELEMENTS // max(1, width))
    return [slice(start, start + block) for start in range(0, rows, block)]
