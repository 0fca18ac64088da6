"""Memory that the ranks of a node share: one mapping without a name in any file system.

A memfd is reached through the process that made it and goes with the last process that maps it, however that ends, so
that nothing is ever left behind. It is of mode 0600, does not count against the size of ``/dev/shm``, and each rank
refuses one that is another user's.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Sequence

import torch
from torch import Tensor

from meft_engine.offload.memory import Mapping, advise_huge_pages, pin
from meft_engine.parallel.ranks import Ranks

_ALIGNMENT = 64


class NodeMemory:
    """Memory of ``size`` bytes that all ranks of this node map; every rank has to construct it.

    Tables are cut from it one after the other, by all ranks in the same order.

    Raises:
        OSError: if it cannot be had or shared.
    """

    def __init__(self, ranks: Ranks, size: int, *, pin_memory: bool = False, huge_pages: bool = True) -> None:
        self._size = max(size, mmap.PAGESIZE)
        self._huge_pages = huge_pages
        leads = ranks.local_rank == 0
        descriptor = -1
        try:
            if leads:
                descriptor = os.memfd_create("meft-rows", os.MFD_CLOEXEC)
                os.fchmod(descriptor, 0o600)
                os.ftruncate(descriptor, self._size)
            at_leader = ranks.gather_objects(descriptor)[ranks.node[0]]
            if not leads:
                descriptor = _open_of(ranks.processes[ranks.node[0]], at_leader, self._size)
            self._mapping = Mapping(descriptor, self._size, flags=mmap.MAP_SHARED)
            ranks.barrier()  # the leader's descriptor is what the others open
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self._used = 0
        if pin_memory and torch.cuda.is_available():
            pin(self._mapping, torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr())

    def take(self, shape: Sequence[int], dtype: torch.dtype, present: Sequence[slice] = ()) -> Tensor:
        """The next table [*shape], of zeros.

        Args:
            present: rows that this rank writes first, so that their pages lie near its cores and memory runs out
                here or never.

        Raises:
            MemoryError: if more is taken than was asked for.
        """
        elements = math.prod(shape)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + elements * dtype.itemsize > self._size:
            raise MemoryError(f"{self._size} bytes of shared memory were asked for, and more are taken")
        self._used = start + elements * dtype.itemsize
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=elements, offset=start).view(*shape)
        for rows in present:
            part = tensor[rows]
            if self._huge_pages and part.numel() and hasattr(mmap, "MADV_HUGEPAGE"):
                offset = start + (part.data_ptr() - tensor.data_ptr())
                advise_huge_pages(self._mapping, offset, part.nbytes)
            part.fill_(0)
        return tensor


def bytes_taken(shapes: Sequence[tuple[Sequence[int], torch.dtype]]) -> int:
    """How large a memory has to be for these tables."""
    return sum(-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in shapes)


def _open_of(process: int, descriptor: int, size: int) -> int:
    """Another process's memory, if it is what it has to be.

    Raises:
        PermissionError: if it is another user's or open to others.
    """
    found = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    about = os.fstat(found)
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) != 0o600 or about.st_size != size:
        os.close(found)
        raise PermissionError(
            f"the shared memory of process {process} belongs to user {about.st_uid}, has mode "
            f"{stat.S_IMODE(about.st_mode):o} and {about.st_size} bytes, where user {os.geteuid()}, mode 600 and "
            f"{size} bytes are expected; start all ranks of a node as one user"
        )
    return found
