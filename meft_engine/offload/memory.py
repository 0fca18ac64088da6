"""Host memory of exactly the size asked for."""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("meft_engine")

# Tables that begin at the same offset in their pages make loads wait for unrelated stores at the same offset of another
# table ("4K aliasing"); successive tables therefore begin at different ones.
_SKEWS = itertools.cycle(range(0, mmap.PAGESIZE, 1088))


class Mapping(mmap.mmap):
    """A mapping that is unpinned before it goes back to the system, when its last tensor dies."""

    address: int | None = None

    def __del__(self) -> None:
        if self.address is not None:
            torch.cuda.cudart().cudaHostUnregister(self.address)


_HUGE_PAGE = 1 << 21

# mmap has no name for it: address space that is not counted as memory before it is written to.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


def host_zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    pin_memory: bool = False,
    huge_pages: bool = True,
    present: slice | None = None,
) -> Tensor:
    """Zeros in an anonymous mapping of their own, rounded up to whole pages and no further.

    Every page is really there when this returns, so that memory runs out here or never, and it goes back to the system
    when the tensor dies. torch's own allocator would place tables in whatever memory the process had freed before, and
    round pinned ones up to a power of two.

    Args:
        shape, dtype: of the result.
        pin_memory: register the mapping with CUDA, so that copies to the device are fast and asynchronous. Ignored
            where there is no GPU.
        huge_pages: ask the system for pages of 2 MiB, which spare address translation.
        present: the only rows that will be used, which are the only ones to take memory; the others are addresses.
    """
    elements = math.prod(shape)
    if elements == 0:
        return torch.zeros(shape, dtype=dtype)
    skew = next(_SKEWS)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if present is None else _NO_RESERVE)
    mapping = Mapping(-1, skew + elements * dtype.itemsize, flags=flags)
    tensor = torch.frombuffer(mapping, dtype=dtype, count=elements, offset=skew).view(*shape)
    part = tensor if present is None else tensor[present]
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        if present is None:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        elif part.numel():
            advise_huge_pages(mapping, skew + part.storage_offset() * dtype.itemsize, part.nbytes)
    part.fill_(0)
    if pin_memory and torch.cuda.is_available():
        pin(mapping, tensor.data_ptr() - skew)
    return tensor


class ReusedMemory:
    """Host memory for tensors that come and go, such as gradients.

    What a tensor lay in is given out again once nothing refers to it any more. Memory that comes from the system anew
    is filled with zeros page by page, which takes longer than writing what it is for. Threads may share it.

    Args:
        pin_memory: register it with CUDA, as :func:`host_zeros` does.
    """

    def __init__(self, *, pin_memory: bool = False) -> None:
        self._pins = pin_memory and torch.cuda.is_available()
        self._free: list[Mapping] = []
        self._lock = threading.RLock()  # a collection of garbage may come back here at any time

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor of whatever was there before."""
        elements = math.prod(shape)
        if elements == 0:
            return torch.empty(shape)
        mapping = self._find(elements * torch.float32.itemsize)
        lease = (ctypes.c_byte * len(mapping)).from_buffer(mapping)
        # The tensor's storage holds the lease, whichever views of it there are.
        weakref.finalize(lease, self._give_back, mapping).atexit = False
        return torch.frombuffer(lease, dtype=torch.float32, count=elements).view(shape)

    def _find(self, needed: int) -> Mapping:
        with self._lock:
            fitting = [place for place, mapping in enumerate(self._free) if needed <= len(mapping) <= 4 * needed]
            if fitting:
                return self._free.pop(min(fitting, key=lambda place: len(self._free[place])))
            if self._free:
                self._free.pop(0)  # of another size, which has not been asked for for the longest time
        mapping = Mapping(-1, -(-needed // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if self._pins:
            pin(mapping, torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr())
        return mapping

    def _give_back(self, mapping: Mapping) -> None:
        with self._lock:
            self._free.append(mapping)


def advise_huge_pages(mapping: mmap.mmap, start: int, length: int) -> None:
    """Ask for large pages inside a range; beyond its ends they would bring memory along that nobody uses."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        mapping.madvise(mmap.MADV_HUGEPAGE, first, last - first)


def pin(mapping: Mapping, address: int) -> None:
    """Register a mapping, which begins at ``address``, with CUDA; says so once where that fails."""
    error = torch.cuda.cudart().cudaHostRegister(address, len(mapping), 0)
    if int(error) == 0:
        mapping.address = address
    else:
        logger.warning(
            "%.2f GiB of host memory could not be pinned (CUDA error %d), so copies to the device will be slower; "
            "raise the limit of locked memory (ulimit -l), or set offload.pin_memory = false",
            len(mapping) / 2**30,
            int(error),
        )


def pieces(rows: slice, row_bytes: int, limit: int = 1 << 24) -> list[slice]:
    """Consecutive parts of ``rows``, none of which takes more than ``limit`` bytes (but for a single row)."""
    step = max(1, limit // max(1, row_bytes))
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
