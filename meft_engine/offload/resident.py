"""A table's compute copy that a device keeps whole, and the updated rows that are on their way to it."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_engine.offload.copies import Copy
from meft_engine.offload.staging import StagedRows
from meft_kernels.quantized import QuantizedRows


class ResidentRows:
    """The copy [r, d] on a device.

    Args:
        dtype: of the copy; int8: with a scale for each row.
        updates: brings updated rows beside the computation; ``None``: each is waited for.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, updates: StagedRows | None) -> None:
        self.table: Tensor | QuantizedRows
        if dtype == torch.int8:
            self.table = QuantizedRows.zeros(shape, device)
        else:
            self.table = torch.zeros(shape, dtype=dtype, device=device)
        self._updates = updates
        self.bytes_sent = 0
        """Of updated rows, so far."""
        # Which rows, and what they are; the copy of the latter ends last.
        self._arriving: list[tuple[Tensor, Tensor, Copy]] = []

    def changed(self, rows: Tensor | slice, host: Tensor) -> None:
        """Follow what has been written to rows of the table on the ``host``; any thread may call this that keeps
        others from writing. Whoever reads next has to :meth:`land` it."""
        if self._updates is not None and isinstance(rows, Tensor):
            # Put in place by the readers' thread, so that the copy changes in the order of its readers.
            sent, _ = self._updates.send(rows)
            found, copy = self._updates.bring(host, rows)
            self._arriving.append((sent, found, copy))
            self.bytes_sent += sent.nbytes + found.nbytes
            return
        self.land()
        self._put(rows, host[rows].to(self.table.device))

    def land(self) -> None:
        """Put what has been sent in its place, for whatever the device is told next."""
        for rows, found, copy in self._arriving:
            copy.hold_device()
            self._put(rows, found)
        self._arriving.clear()

    def settle(self) -> None:
        """Nothing is on its way that reads rows of the device."""

    def changed_there(self, rows: Tensor, changed: Tensor, compute: Tensor) -> None:
        """Follow rows [n] int64 that the device owns, whose compute copies are now [n, d]."""
        self._put(rows, compute)

    def _put(self, rows: Tensor | slice, found: Tensor) -> None:
        if isinstance(self.table, QuantizedRows):
            self.table.put(rows, found)
        else:
            self.table[rows] = found

    def finish_reading(self) -> None:
        """Nothing of the table on the host is read later than it is said to change."""
