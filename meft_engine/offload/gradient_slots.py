"""Gradients of a layer's rows that stay on the device until the end of an accumulation window.

A row that comes while there is room keeps its slot to the end, and later micro-steps add to it there; the gradients of
all other rows go to the host at once. So a row's sum is in one place, in the order of the micro-steps, wherever it is.
Rows that the device owns have slots of their own, and their sums are never sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meft_engine.offload.hot_rows import HotRows
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_kernels.sparse import GradientPlaces


class GradientSlots:
    """Slots [S, d] for each of a layer's two tables; a row has the same slot in both.

    Args:
        keys, values: the tables, of the same shape and device. slots: S. hot: what the device owns of them; H rows at
            most, whose slots stand behind the others.
    """

    def __init__(
        self,
        keys: PartiallyOffloadedTensor,
        values: PartiallyOffloadedTensor,
        slots: int,
        hot: HotRows | None = None,
    ) -> None:
        self._tables, self._size, self._hot, device = (keys, values), slots, hot, keys.device
        size = slots + (hot.most if hot is not None else 0)
        self._keys, self._values = (torch.empty(size, keys.width, device=device) for _ in range(2))
        if hot is not None:
            hot.use_gradients(self._keys[slots:], self._values[slots:])
        # With an element more, for what has no slot.
        self._slot_of_row = torch.full((keys.rows + 1,), -1, dtype=torch.int32, device=device)
        self._row_of_slot = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._used = torch.zeros(1, dtype=torch.int32, device=device)
        self._empty, self._leaving = True, False
        for table in self._tables:
            table.before_gradient = self.flush

    def places(self, rows: Tensor, count: Tensor | None) -> GradientPlaces:
        """Where a micro-step's gradients go; the host waits for nothing.

        Args:
            rows: [U'] int64, of which the first ``count`` [1] int32 are meant; ``None``: all.
        """
        if self._leaving:
            # Copies of what the slots held may still be running, where a layer comes again after it has been flushed.
            self._tables[0].finish_sending()
        self._empty, self._leaving = False, False
        most, nowhere = rows.numel(), self._slot_of_row.numel() - 1
        position = torch.arange(most, device=rows.device)
        there = position < (most if count is None else count)
        known = torch.where(there, rows, nowhere)
        slots, first = self._slot_of_row[known], torch.zeros_like(there)
        if self._hot is not None:
            places, first = self._hot.touch(known)
            slots = torch.where(places >= 0, self._size + places, slots)
        lacks = there & (slots < 0)
        fresh = self._used + lacks.cumsum(0, dtype=torch.int32) - 1
        gets = lacks & (fresh < self._size)
        slots = torch.where(gets, fresh, slots)
        self._slot_of_row[torch.where(gets, rows, nowhere)] = slots
        self._slot_of_row[nowhere] = -1
        self._row_of_slot[torch.where(gets, fresh, self._size).long()] = rows
        self._used += gets.sum(dtype=torch.int32)

        rest = lacks & ~gets
        order = torch.where(rest, rest.cumsum(0, dtype=torch.int32) - 1, -1)
        others = rows.new_zeros(most + 1)
        others[torch.where(rest, order, most).long()] = rows
        return GradientPlaces(
            self._values,
            self._keys,
            slots=slots,
            fresh=(gets | first).int(),
            rest=order,
            rows=others[:most],
            count=rest.sum(dtype=torch.int32)[None],
        )

    def flush(self) -> None:
        """Send what is here to the tables, and begin anew."""
        if self._empty:
            return
        self._empty, self._leaving = True, True
        count = self._used.clone()  # which is set to 0 below
        for table, grad in zip(self._tables, (self._keys, self._values), strict=True):
            table.accumulate(self._row_of_slot[:-1], grad[: self._size], count=count)
        self._slot_of_row.fill_(-1)
        self._used.zero_()

    def device_bytes(self) -> int:
        """Of both tables' slots, without those of rows that the device owns."""
        return self._keys[: self._size].nbytes + self._values[: self._size].nbytes
