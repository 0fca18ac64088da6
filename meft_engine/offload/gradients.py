"""The gradient of a table's touched rows, added up over the micro-steps of an accumulation window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from meft_engine.offload.memory import ReusedMemory
from meft_kernels.dispatch import row_passes


class RowGradient(NamedTuple):
    """``rows`` [n] int64, no two equal, and ``grad`` [n, d] float32, both on the host."""

    rows: Tensor
    grad: Tensor


class GradientAccumulator:
    """Sums row gradients in the order of the calls.

    The first gradient of a window is taken over as it is, and in a window of one micro-step it is all there is. Further
    ones are added in place; rows that appear later are put behind, into a buffer that grows by doubling.
    """

    def __init__(self, table_rows: int, threads: int, *, pin_memory: bool = False) -> None:
        self._table_rows, self.threads = table_rows, threads
        self.memory = ReusedMemory(pin_memory=pin_memory)
        """For gradients to come."""
        self._slot_of_row: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the sum."""
        self._rows: Tensor | None = None
        self._grad: Tensor | None = None
        self._used = 0
        self._norms: tuple[Tensor, int] | None = None

    def add(self, rows: Tensor, grad: Tensor, squared_norms: Tensor | None = None) -> None:
        """Add ``grad`` [n, d] float32 of ``rows`` [n] int64 (no two equal). The first tensors are kept, not copied.

        Args:
            squared_norms: [n] float64, of the rows of ``grad``, where they are known.
        """
        if self._rows is None:
            self._rows, self._grad, self._used = rows, grad, rows.numel()
            self._mapped = False
            # Whoever looks at the sum may change it in place, which the version tells.
            self._norms = (squared_norms, grad._version) if squared_norms is not None else None
            return
        self._norms = None
        slots, fresh = self._slots(rows)
        row_passes().accumulate_rows(self._grad, slots, fresh, grad, threads=self.threads)

    def sum(self) -> RowGradient | None:
        """What has been added since the last :meth:`clear`, by the time of a row's first appearance."""
        if self._rows is None:
            return None
        return RowGradient(self._rows[: self._used], self._grad[: self._used])

    def squared_norm(self) -> float:
        """Of the sum; 0 of nothing, NaN if any of it is."""
        if self._rows is None:
            return 0.0
        grad = self._grad[: self._used]
        if self._norms is not None and self._norms[1] == grad._version:
            return float(self._norms[0].sum())
        return float(row_passes().squared_norms(grad, threads=self.threads).sum())

    def _slots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the buffer each row's sum is or shall be, and which rows are new there."""
        if self._slot_of_row is None:
            self._slot_of_row = torch.full((self._table_rows,), -1, dtype=torch.int64)
        if not self._mapped:
            self._slot_of_row.fill_(-1)
            self._slot_of_row[self._rows] = torch.arange(self._used)
            self._mapped = True
        slots = self._slot_of_row[rows]
        fresh = slots < 0
        new = rows[fresh]
        if new.numel():
            self._reserve(self._used + new.numel())
            places = torch.arange(self._used, self._used + new.numel())
            slots[fresh] = places
            self._slot_of_row[new] = places
            self._rows[places] = new
            self._used += new.numel()
        return slots, fresh

    def _reserve(self, count: int) -> None:
        if count > self._rows.numel():
            capacity = min(self._table_rows, max(count, 2 * self._used))
            rows, grad = self._rows.new_empty(capacity), self._grad.new_empty(capacity, self._grad.shape[1])
            rows[: self._used], grad[: self._used] = self._rows[: self._used], self._grad[: self._used]
            self._rows, self._grad = rows, grad
