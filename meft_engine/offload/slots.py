"""Rows that visit a device in slots, in which they stay from a forward to its backward and over micro-steps.

Every table that can afford it has slots of its own. The others share two sets of slots: what a layer's forward has
brought is gone when its backward comes, so it is brought again while the backward of the layer behind it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_engine.offload.copies import Copies, Copy
from meft_engine.offload.staging import StagedRows
from meft_kernels.dispatch import RowsAt, slot_passes
from meft_kernels.slots import Gathered, OwnedRows, Residency, copy_owned, plan


@dataclass
class _Visit:
    """Rows that have been asked for, and where they are or will be."""

    rows: Tensor
    count: Tensor
    version: int
    found: Gathered
    copy: Copy
    placing: tuple[Tensor, Tensor] | None
    """Slots, and the rows that are put there once their copy has ended; ``None``: the device puts them there itself."""
    landed: bool = False

    def is_of(self, rows: Tensor, version: int) -> bool:
        # Another tensor of the same memory, after autograd has kept it; what is kept here cannot be used anew.
        return (rows.data_ptr(), rows.numel(), version) == (self.rows.data_ptr(), self.rows.numel(), self.version)


class _SlotSet:
    """Slots [S, d], and who has them."""

    def __init__(self, owner: SlottedRows, slots: int) -> None:
        # A first use in inference mode must not make them unchangeable outside of it.
        with torch.inference_mode(False):
            self.buffer = torch.empty(slots, owner.shape[1], dtype=owner.dtype, device=owner.device)
            self.residency = Residency.empty(owner.shape[0], slots, owner.device)
        self.owner = owner
        self.visit: _Visit | None = None

    def fits(self, owner: SlottedRows, slots: int) -> bool:
        same = (self.owner.shape, self.owner.dtype) == (owner.shape, owner.dtype)
        return same and self.buffer.shape[0] >= slots

    def take_back(self) -> None:
        """From the table that has it; what is on its way comes first."""
        self.land()
        self.owner.leave(self)

    def give_to(self, owner: SlottedRows) -> None:
        """To another table, of which nothing is there."""
        self.owner, self.visit = owner, None
        self.residency.slot_of_row.fill_(-1)
        self.residency.row_of_slot.fill_(-1)

    def land(self) -> None:
        """Let whatever the device is told next find the rows in their slots."""
        visit = self.visit
        if visit is None:
            return
        visit.copy.hold_device()
        if not visit.landed:
            if visit.placing is not None:
                self.buffer.index_copy_(0, *visit.placing)
            self.owner.note(visit.found.counts)
            visit.landed = True

    def bytes(self) -> int:
        return slot_set_bytes(self.residency.slot_of_row.numel(), self.buffer.shape[0], self.owner.row_bytes)


def slot_set_bytes(rows: int, slots: int, row_bytes: int) -> int:
    """Bytes of ``slots`` slots for a table of so many rows, and of what says which row is where."""
    return slots * row_bytes + (2 * rows + 3 * slots) * 4


class SlotPool:
    """All slots on one device.

    Args:
        copies: begins copies. staged: brings rows that the device cannot read in place.
        budget: bytes of rows that the tables' own slots may hold altogether; ``None``: as many as they need.
    """

    def __init__(self, copies: Copies, staged: StagedRows, budget: int | None) -> None:
        self.copies, self.staged, self._budget = copies, staged, budget
        self._own: dict[SlottedRows, _SlotSet] = {}
        self._shared: list[_SlotSet] = []  # the one that was used last is the last
        # The layers as the forward meets them: whose turn comes before a table's.
        self._before: dict[SlottedRows, SlottedRows] = {}
        self._latest: SlottedRows | None = None

    def bytes(self) -> int:
        """Allocated."""
        return sum(one.bytes() for one in (*self._own.values(), *self._shared))

    def slots(self) -> dict[str, int]:
        """How many there are: the tables' ``own``, and ``shared`` ones."""
        own = sum(one.buffer.shape[0] for one in self._own.values())
        return {"own": own, "shared": sum(one.buffer.shape[0] for one in self._shared)}

    def met(self, table: SlottedRows) -> None:
        """A forward has come to a table."""
        if self._latest is not None and self._latest is not table:
            self._before[table] = self._latest
        self._latest = table

    def before(self, table: SlottedRows) -> SlottedRows | None:
        """The table that a backward comes to after this one, if it is to share slots."""
        self._latest = None
        before = self._before.get(table)
        return before if before is not None and before not in self._own else None

    def sets_of(self, table: SlottedRows) -> list[_SlotSet]:
        """Where rows of a table may be."""
        own = [self._own[table]] if table in self._own else []
        return own + [one for one in self._shared if one.owner is table]

    def slots_for(self, table: SlottedRows, count: int, *, keep: bool) -> _SlotSet:
        """At least ``count`` slots, with what is still in them.

        Args:
            keep: give the table slots of its own, or more of them, where that can be afforded.
        """
        own = self._own.get(table)
        if own is not None and own.fits(table, count):
            return own
        if keep and self._affords(table, count):
            if own is not None:
                own.take_back()
                del self._own[table], own  # given back first
            self._own[table] = _SlotSet(table, count)
            return self._own[table]
        for one in self._shared:
            if one.owner is table and one.fits(table, count):
                return one
        return self._lend(table, count)

    def use(self, slots: _SlotSet) -> None:
        """Rows in these slots are about to be read, so that others must be lent next."""
        self._shared.sort(key=lambda one: one is slots)

    def _affords(self, table: SlottedRows, count: int) -> bool:
        if self._budget is None:
            return True
        others = sum(one.buffer.nbytes for owner, one in self._own.items() if owner is not table)
        return others + count * table.row_bytes <= self._budget

    def _lend(self, table: SlottedRows, count: int) -> _SlotSet:
        """The one of both shared sets that has not been used last."""
        if len(self._shared) < 2:
            self._shared.append(_SlotSet(table, count))
            return self._shared[-1]
        one = self._shared.pop(0)
        one.take_back()
        if one.fits(table, count):
            one.give_to(table)
        else:
            count = max(count, one.buffer.shape[0])
            del one  # given back first
            one = _SlotSet(table, count)
        self._shared.append(one)
        return one

    def forget(self, table: SlottedRows) -> None:
        """A table is closed."""
        self._own.pop(table, None)
        self._before = {one: other for one, other in self._before.items() if table not in (one, other)}
        self._shared = [one for one in self._shared if one.owner is not table]
        self._latest = None


class SlottedRows:
    """A table's visits to the device.

    Args:
        shape: [r, d] of the table. dtype: of its compute copy. device: where it computes. pool: of the slots there.
        updates: tells the device which rows have changed.
        reading: gives the table on the host, which no update changes meanwhile; see ``PartiallyOffloadedTensor``.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        pool: SlotPool,
        updates: StagedRows,
        reading: Callable[..., AbstractContextManager[Tensor]],
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._pool, self._updates, self._reading = pool, updates, reading
        self._arriving: list[tuple[Tensor, Copy] | slice] = []
        self._asked: tuple[Tensor, Tensor | None, int] | None = None
        self._at: _SlotSet | None = None  # where the last visit is
        self._read: Copy | None = None
        # [2] int64 on the device: rows that were there, and that had to be brought.
        self._visits: Tensor | None = None
        self.owned: OwnedRows | None = None
        """Rows of the table that the device owns, which it brings from there."""

    @property
    def row_bytes(self) -> int:
        """Of a row in its slot."""
        return self.shape[1] * self.dtype.itemsize

    def expect(self, rows: Tensor, count: Tensor | None, version: int, *, latest: bool, keep: bool) -> None:
        """Begin to bring rows that will be asked for; arguments as :meth:`at` has them."""
        self._pool.met(self)
        if self._visit(rows, version) is None:
            self._begin(rows, count, version, latest=latest, keep=keep)

    def at(
        self, rows: Tensor, count: Tensor | None, version: int, *, latest: bool, keep: bool, backward: bool
    ) -> RowsAt:
        """Where the rows are, for whatever the device is told next.

        Args:
            rows: [U'] int64 on the device, of which the first ``count`` [1] int32 are meant; ``None``: all.
            version: of the table; rows that were brought at another are looked at again.
            latest: as ``PartiallyOffloadedTensor.reading`` has it. keep: let them stay for the backward and the next
                micro-steps. backward: bring what the backward will ask for next.
        """
        visit = self._visit(rows, version)
        if visit is None:
            self._begin(rows, count, version, latest=latest, keep=keep)
        self._at.land()
        self._pool.use(self._at)
        place = RowsAt(self._at.buffer, self._at.visit.found.slots)
        if backward and (before := self._pool.before(self)) is not None:
            before.again()
        return place

    def again(self) -> None:
        """Bring what was asked for last, if it is no longer there."""
        if self._asked is not None and self._visit(self._asked[0], self._asked[2]) is None:
            self._begin(*self._asked, latest=False, keep=False)

    def _visit(self, rows: Tensor, version: int) -> _Visit | None:
        visit = self._at.visit if self._at is not None else None
        return visit if visit is not None and visit.is_of(rows, version) else None

    def leave(self, slots: _SlotSet) -> None:
        """Slots are to be another table's."""
        if self._at is slots:
            self._at = None

    def _begin(self, rows: Tensor, count: Tensor | None, version: int, *, latest: bool, keep: bool) -> None:
        self._asked = rows, count, version
        count = torch.full((1,), rows.numel(), dtype=torch.int32, device=self.device) if count is None else count
        with self._reading(latest=latest) as host:
            self._at = held = self._pool.slots_for(self, rows.numel(), keep=keep)
            held.land()
            found, placing = Gathered.room(rows.numel(), self.device), None
            if self._pool.copies.read_in_place(host):
                gather = slot_passes(self.device).gather
                self._read = copy = self._pool.copies.beside(
                    lambda: gather(host, held.buffer, rows, count, held.residency, found, self.owned),
                    (found.slots, found.copied, found.counts),
                    self.owned or (),
                )
            else:
                which, here = plan(rows, count, held.residency, found, self.owned)
                if self.owned is not None:
                    copy_owned(self.owned, held.buffer, rows, here, found)
                brought, copy = self._pool.staged.bring(host, rows[which].cpu())
                placing = found.slots[which].long(), brought
            held.visit = _Visit(rows, count, version, found, copy, placing)

    def changed(self, rows: Tensor | slice, host: Tensor) -> None:
        """Let rows be brought anew when they are next asked for; any thread may call this that keeps others from
        writing."""
        self._arriving.append(self._updates.send(rows) if isinstance(rows, Tensor) else rows)

    def land(self) -> None:
        """Let whoever asks next see what has :meth:`changed`."""
        sets = self._pool.sets_of(self) if self._arriving else []
        for held in sets:
            held.land()
        for change in self._arriving:
            if isinstance(change, tuple):
                change[1].hold_device()
            for held in sets:
                held.residency.version_of_row[change if isinstance(change, slice) else change[0]] += 1
        self._arriving.clear()

    def settle(self) -> None:
        """Let whatever the device is told next come after all that it was told to bring."""
        for held in self._pool.sets_of(self):
            held.land()

    def changed_there(self, rows: Tensor, changed: Tensor, compute: Tensor) -> None:
        """Let rows [n] int64 that the device owns be brought anew, those that have ``changed`` [n] bool."""
        for held in self._pool.sets_of(self):
            held.residency.version_of_row.index_add_(0, rows, changed.int())

    def finish_reading(self) -> None:
        """Wait until the device no longer reads the table on the host, which is about to change."""
        if self._read is not None:
            self._read.wait()
            self._read = None

    def note(self, counts: Tensor) -> None:
        """Count a visit by what ``Gathered.counts`` [5] says of it; a row that the device owns was there."""
        there = torch.stack((counts[0] + counts[4], counts[1] + counts[2] - counts[4])).long()
        self._visits = there if self._visits is None else self._visits + there

    def visits(self) -> tuple[int, int]:
        """Rows that were in their slots when they were asked for, and rows that were brought. Waits for the device."""
        return tuple(self._visits.tolist()) if self._visits is not None else (0, 0)

    def close(self) -> None:
        """Give the slots back."""
        self.finish_reading()
        self._pool.forget(self)
        self._arriving.clear()
        self._asked = self._at = None
