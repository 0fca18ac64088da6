"""The passes of ``kernels/rows.py`` compiled for this machine, at the first use, by torch's extension loader."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from meft_kernels.rows import AdamStep, Coast, RowTable

logger = logging.getLogger("meft_engine")

_SOURCE = Path(__file__).with_name("rows.cpp")
# No contraction: each operation rounds once, as in PyTorch. Errno and traps would only keep √ from being vectorised.
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_POINTER = ctypes.c_void_p


class _Table(ctypes.Structure):
    _fields_ = [
        ("width", ctypes.c_int64),
        ("high", _POINTER),
        ("low", _POINTER),
        ("exp_avg", _POINTER),
        ("exp_avg_sq", _POINTER),
        ("step", _POINTER),
        ("moments_bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Coast(ctypes.Structure):
    _fields_ = [("of_row", _POINTER), ("coefficients", _POINTER), ("terms", ctypes.c_int64)]


class _Adam(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("grad_scale", "beta1", "rest1", "beta2", "rest2", "eps", "decay")),
        ("now", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("lr", "precise_beta1", "precise_beta2")),
        ("seed", ctypes.c_uint64),
    ]


_COUNT = ctypes.c_int64
_ARGUMENTS = {
    "meft_adam_rows": [_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER],
    "meft_read_coasted": [_POINTER, _POINTER, ctypes.c_float, _COUNT, _POINTER, _POINTER],
    "meft_gather_rows": [_POINTER, _COUNT, _POINTER, _POINTER],
    "meft_accumulate_rows": [_COUNT, _COUNT, *[_POINTER] * 4, ctypes.c_int32],
    "meft_squared_norms": [_COUNT, _COUNT, _POINTER, _POINTER, ctypes.c_int32],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes, or ``None`` (after one warning) where they cannot be built.

    ``MEFT_CPU_BUILD`` chooses: ``native`` (the default) for this machine's own instructions, ``portable`` for any
    machine of its architecture, ``none`` for PyTorch.
    """
    asked = os.environ.get("MEFT_CPU_BUILD", "native")
    if asked not in ("native", "portable", "none"):
        raise ValueError(f'MEFT_CPU_BUILD = "{asked}" is none of "native", "portable" and "none"')
    if asked == "none":
        return None
    try:
        return _build(asked)
    except Exception as error:  # whatever a compiler, a linker or a file system can do
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning(
            "the row kernels could not be compiled (%s); PyTorch does their work, with the same results but several "
            "times slower. A C++17 compiler with OpenMP, such as g++, is what they need",
            first_line,
        )
        return None


def _build(kind: str) -> ctypes.CDLL:
    from torch.utils import cpp_extension

    # Machines of a cluster share a home folder and thus the cache, but not their instruction sets.
    machine = _instruction_set() if kind == "native" else platform.machine()
    name = f"meft_rows_{kind}_{hashlib.sha256(machine.encode()).hexdigest()[:10]}"
    flags = [*_FLAGS, *(["-march=native"] if kind == "native" else [])]
    with _ninja_on_path():
        path = cpp_extension.load(
            name, [str(_SOURCE)], extra_cflags=flags, extra_ldflags=["-fopenmp"], is_python_module=False
        )
    lib = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    lib.meft_adam_rows.restype = ctypes.c_int64
    return lib


def _instruction_set() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for ninja on PATH, where that of a virtual environment that was not activated is not."""
    before = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = f"{before}{os.pathsep}{ninja.BIN_DIR}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


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
        _address(rows, torch.int64),
        _address(grad, torch.float32),
    )


def read_coasted(table: RowTable, rows: Tensor, coast: Coast, eps: float, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.read_coasted`."""
    out = torch.empty(rows.numel(), table.high.shape[1])
    library().meft_read_coasted(
        ctypes.byref(_table(table, threads)),
        ctypes.byref(_coast(coast)),
        eps,
        rows.numel(),
        _address(rows, torch.int64),
        _address(out, torch.float32),
    )
    return out


def gather_rows(high: Tensor, rows: Tensor, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.gather_rows`."""
    _require_rows(rows, high.shape[0])
    out = torch.empty(rows.numel(), high.shape[1])
    # The pass tells planes from whole masters by the lower plane, of which it reads nothing.
    planes = high.dtype == torch.bfloat16
    address = _address(high, high.dtype)
    table = _Table(high.shape[1], address, address if planes else None, None, None, None, 0, threads)
    library().meft_gather_rows(
        ctypes.byref(table),
        rows.numel(),
        _address(rows, torch.int64),
        _address(out, torch.float32),
    )
    return out


def accumulate_rows(total: Tensor, slots: Tensor, fresh: Tensor, grad: Tensor, *, threads: int) -> None:
    """As :func:`meft_kernels.rows.accumulate_rows`."""
    library().meft_accumulate_rows(
        grad.shape[1],
        slots.numel(),
        _address(slots, torch.int64),
        _address(fresh, torch.bool),
        _address(grad, torch.float32),
        _address(total, torch.float32),
        threads,
    )


def squared_norms(x: Tensor, *, threads: int) -> Tensor:
    """As :func:`meft_kernels.rows.squared_norms`."""
    out = torch.empty(x.shape[0], dtype=torch.float64)
    library().meft_squared_norms(
        x.shape[1],
        x.shape[0],
        _address(x, torch.float32),
        _address(out, torch.float64),
        threads,
    )
    return out


def _table(table: RowTable, threads: int) -> _Table:
    return _Table(
        table.high.shape[1],
        _address(table.high, table.high.dtype),
        _address(table.low, table.low.dtype) if table.low is not None else None,
        *_moments(table),
        _address(table.step, torch.int32),
        int(table.exp_avg.dtype == torch.bfloat16),
        threads,
    )


def _moments(table: RowTable) -> tuple[int, int | None]:
    first, second = table.exp_avg, table.exp_avg_sq
    if first.dtype != torch.bfloat16:
        return _address(first, torch.float32), _address(second, torch.float32)
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
    return _Coast(_address(coast.of_row, torch.int32), _address(coast.coefficients, torch.float32), terms)


def _address(x: Tensor, dtype: torch.dtype) -> int:
    # What C++ would read wrongly in silence. Row ids are checked by those who take them from outside.
    assert x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu", (x.dtype, dtype, x.stride(), x.device)
    return x.data_ptr()


def _require_rows(rows: Tensor, count: int) -> None:
    if not rows.numel():
        return
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or most >= count:
        raise IndexError(f"rows {least} to {most} are asked for, of a table of {count}")
