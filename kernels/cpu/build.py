"""Compiles the C++ passes for this machine, at the first use, by torch's extension loader."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("meft_engine")

_SOURCES = [str(Path(__file__).with_name(name)) for name in ("rows.cpp", "sparse.cpp")]
# No contraction: each operation of rows.cpp rounds once, as in PyTorch. Errno and traps would only keep √ from being
# vectorised.
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
POINTER, COUNT, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = {
    "meft_adam_rows": [POINTER, POINTER, POINTER, COUNT, POINTER, POINTER],
    "meft_read_coasted": [POINTER, POINTER, ctypes.c_float, COUNT, POINTER, POINTER],
    "meft_gather_rows": [POINTER, COUNT, POINTER, POINTER],
    "meft_accumulate_rows": [COUNT, COUNT, *[POINTER] * 4, FLAG],
    "meft_squared_norms": [COUNT, COUNT, POINTER, POINTER, FLAG],
    "meft_score_experts": [*[COUNT] * 5, POINTER, POINTER, FLAG, POINTER, POINTER, FLAG],
    "meft_largest": [*[COUNT] * 3, POINTER, POINTER, FLAG],
    "meft_select": [*[COUNT] * 4, *[POINTER] * 9, FLAG],
    "meft_combine_rows": [*[COUNT] * 3, *[POINTER] * 4, FLAG, POINTER, FLAG],
    "meft_score_picks": [*[COUNT] * 3, *[POINTER] * 4, FLAG, POINTER, FLAG],
    "meft_index_rows": [COUNT, COUNT, *[POINTER] * 4],
    "meft_picks_of_rows": [COUNT, COUNT, *[POINTER] * 4],
    "meft_row_gradients": [*[COUNT] * 4, *[POINTER] * 4, FLAG, *[POINTER] * 11, FLAG],
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
        return build(asked)
    except Exception as error:  # whatever a compiler, a linker or a file system can do
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning(
            "the CPU kernels could not be compiled (%s); PyTorch does their work, with the same results but several "
            "times slower. A C++17 compiler with OpenMP, such as g++, is what they need",
            first_line,
        )
        return None


def build(kind: str) -> ctypes.CDLL:
    """The passes compiled for this machine (``native``) or any of its architecture (``portable``)."""
    from torch.utils import cpp_extension

    # Machines of a cluster share a home folder and thus the cache, but not their instruction sets.
    machine = _instruction_set() if kind == "native" else platform.machine()
    name = f"meft_{kind}_{hashlib.sha256(machine.encode()).hexdigest()[:10]}"
    flags = [*_FLAGS, *(["-march=native"] if kind == "native" else [])]
    with _ninja_on_path():
        path = cpp_extension.load(
            name, _SOURCES, extra_cflags=flags, extra_ldflags=["-fopenmp"], is_python_module=False
        )
    lib = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    lib.meft_adam_rows.restype = lib.meft_index_rows.restype = COUNT
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


def address(x: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor of this type lies."""
    # What C++ would read wrongly in silence. Row ids are checked by those who take them from outside.
    assert x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu", (x.dtype, dtype, x.stride(), x.device)
    return x.data_ptr()
