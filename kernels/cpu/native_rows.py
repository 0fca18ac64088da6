"""The passes of ``kernels/rows.py``, compiled."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from meft_kernels.cpu.build import POINTER, address, library
from meft_kernels.rows import AdamStep, Coast, RowTable


class _Table(ctypes.Structure):
    _fields_ = [
        ("width", ctypes.c_int64),
        ("high", POINTER),
        ("low", POINTER),
        ("exp_avg", POINTER),
        ("exp_avg_sq", POINTER),
        ("step", POINTER),
        ("moments_bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Coast(ctypes.Structure):
    _fields_ = [("of_row", POINTER), ("coefficients", POINTER), ("terms", ctypes.c_int64)]


class _Adam(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("grad_scale", "beta1", "rest1", "beta2", "rest2", "eps", "decay")),
        ("now", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("lr", "precise_beta1", "precise_beta2")),
        ("seed", ctypes.c_uint64),
    ]


def adam_rows(
    table: RowTable, rows: Tensor, grad: Tensor, step: AdamStep, coast: Coast | None = None, *, threads: int
) -> int:
    """As :func:`meft_kernels.rows.adam_rows`."""
    beta1, beta2 = step.betas
    adam = _Adam(
        *(step.grad_scale, beta1, 1 - beta1, beta2, 1 - beta2, step.eps, step.decay),
        *(step.now, step.lr, beta1, beta2, step.seed),
    )
    # The structs hold addresses alone: the tensors live on in the caller's arguments.
    return library().meft_adam_rows(
        ctypes.byref(_table(table, threads)),
        ctypes.byref(adam),
        ctypes.byref(_coast(coast)),
        rows.numel(),
        address(rows, torch.int64),
        address(grad, torch.float32),
    )


def read_coasted(table: RowTable, rows: Tensor, coast: Coast, eps: float, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.read_coasted`."""
    out = torch.empty(rows.numel(), table.high.shape[1])
    library().meft_read_coasted(
        ctypes.byref(_table(table, threads)),
        ctypes.byref(_coast(coast)),
        eps,
        rows.numel(),
        address(rows, torch.int64),
        address(out, torch.float32),
    )
    return out


def gather_rows(high: Tensor, rows: Tensor, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.gather_rows`."""
    _require_rows(rows, high.shape[0])
    out = torch.empty(rows.numel(), high.shape[1])
    # The pass tells planes from whole masters by the lower plane, of which it reads nothing.
    planes = high.dtype == torch.bfloat16
    place = address(high, high.dtype)
    table = _Table(high.shape[1], place, place if planes else None, None, None, None, 0, threads)
    library().meft_gather_rows(
        ctypes.byref(table),
        rows.numel(),
        address(rows, torch.int64),
        address(out, torch.float32),
    )
    return out


def accumulate_rows(total: Tensor, slots: Tensor, fresh: Tensor, grad: Tensor, *, threads: int) -> None:
    """As :func:`meft_kernels.rows.accumulate_rows`."""
    library().meft_accumulate_rows(
        grad.shape[1],
        slots.numel(),
        address(slots, torch.int64),
        address(fresh, torch.bool),
        address(grad, torch.float32),
        address(total, torch.float32),
        threads,
    )


def squared_norms(x: Tensor, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.squared_norms`."""
    out = torch.empty(x.shape[0], dtype=torch.float64)
    library().meft_squared_norms(
        x.shape[1],
        x.shape[0],
        address(x, torch.float32),
        address(out, torch.float64),
        threads,
    )
    return out


def _table(table: RowTable, threads: int) -> _Table:
    return _Table(
        table.high.shape[1],
        address(table.high, table.high.dtype),
        address(table.low, table.low.dtype) if table.low is not None else None,
        *_moments(table),
        address(table.step, torch.int32),
        int(table.exp_avg.dtype == torch.bfloat16),
        threads,
    )


def _moments(table: RowTable) -> tuple[int, int | None]:
    first, second = table.exp_avg, table.exp_avg_sq
    if first.dtype != torch.bfloat16:
        return address(first, torch.float32), address(second, torch.float32)
    # As paired_moments makes them.
    pairs = second.stride() == first.stride() == (2 * first.shape[1], 2)
    assert (
        pairs
        and first.dtype == second.dtype
        and first.data_ptr() == second.data_ptr() + 2
        and sys.byteorder == "little"
    )
    return second.data_ptr(), None


def _coast(coast: Coast | None) -> _Coast:
    if coast is None:
        return _Coast(None, None, 0)
    terms = (coast.coefficients.shape[1] - 3) // 2
    return _Coast(address(coast.of_row, torch.int32), address(coast.coefficients, torch.float32), terms)


def _require_rows(rows: Tensor, count: int) -> None:
    if not rows.numel():
        return
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or most >= count:
        raise IndexError(f"rows {least} to {most} are asked for, of a table of {count}")
