"""Rows on their way from host memory to the device, through buffers that the device can read by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meft_engine.offload.copies import Copies, Copy


class StagedRows:
    """Puts what is to go to the device into one of two buffers while the device still reads the other.

    Args:
        copies: begins a copy. pin_memory, huge_pages: as :func:`host_zeros` has them.
    """

    def __init__(self, copies: Copies, *, pin_memory: bool, huge_pages: bool) -> None:
        self._copies, self._pins, self._huge = copies, pin_memory, huge_pages
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._read_by: list[Copy | None] = [None, None]
        self._turn = 0

    def bring(self, table: Tensor, rows: Tensor) -> tuple[Tensor, Copy]:
        """Begin to bring rows [n] int64 of a table [r, d] on the host, which may change once this returns.

        Returns:
            [n, d] of the table's dtype on the device, and the copy that is to be waited for before it is used.
        """
        staged = self._buffer((rows.numel(), table.shape[1]), table.dtype)
        torch.index_select(table, 0, rows, out=staged)
        return self._sent(staged)

    def send(self, source: Tensor) -> tuple[Tensor, Copy]:
        """Begin to bring a tensor on the host, which may change once this returns; the result is as above."""
        return self._sent(self._buffer(tuple(source.shape), source.dtype).copy_(source))

    def _sent(self, staged: Tensor) -> tuple[Tensor, Copy]:
        found, copy = self._copies.to_device(staged)
        self._read_by[self._turn] = copy
        return found, copy

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer whose turn it is, once its last copy has ended; larger than before where it must be."""
        self._turn = 1 - self._turn
        if (last := self._read_by[self._turn]) is not None:
            last.wait()
        needed = math.prod(shape) * dtype.itemsize
        if needed > self._buffers[self._turn].numel():
            self._buffers[self._turn] = torch.empty(0, dtype=torch.uint8)  # given back first
            self._buffers[self._turn] = self._copies.staging(
                needed + needed // 4, pin_memory=self._pins, huge_pages=self._huge
            )
        return self._buffers[self._turn][:needed].view(dtype).view(shape)

    def host_bytes(self) -> int:
        """Of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)
