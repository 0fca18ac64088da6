"""Rows and their optimizer state as they are at one moment, read block by block while training goes on.

Copy on write: rows that an update is about to change are copied first, unless they have been read already. What is
copied is bounded; beyond that, the update waits until the reader has come to its rows, which never waits for it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meft_engine.offload.memory import host_zeros, pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam

_WAIT = 0.02
_BLOCK_BYTES = 1 << 22  # of one kind


class Block(NamedTuple):
    """Consecutive rows of a table, which are read together."""

    table: PartiallyOffloadedTensor
    rows: slice


class _Room:
    """Places for copies of rows of all tables whose rows look alike."""

    def __init__(self, planes: dict[str, Tensor], places: int) -> None:
        self._copies = {kind: host_zeros((places, *plane.shape[1:]), plane.dtype) for kind, plane in planes.items()}
        self.row_bytes = _row_bytes(planes)
        self.clear()

    @property
    def left(self) -> int:
        """How many rows there is room for."""
        return len(self._free) - self.used

    def clear(self) -> None:
        """Forget all copies."""
        places = min(map(len, self._copies.values()), default=0)
        self._free = torch.arange(places).flip(0)  # a stack: places that were used lately come first
        self.used = 0

    def keep(self, planes: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Copy rows; gives their places [n] int64, ascending."""
        places = self._free[self.left - len(rows) : self.left].sort().values
        self.used += len(rows)
        ends = (places.diff() != 1).nonzero().flatten() + 1
        # Into one run of places after the other, which is as fast as memory is.
        runs = zip(places.tensor_split(ends), rows.tensor_split(ends), strict=True)
        for first, own in [(int(run[0]), own) for run, own in runs if len(run)]:
            for kind, plane in planes.items():
                torch.index_select(plane, 0, own, out=self._copies[kind][first : first + len(own)])
        return places

    def bring(self, places: Tensor, found: dict[str, Tensor], rows: Tensor) -> None:
        """Put copies into these rows of ``found``."""
        for kind, copies in self._copies.items():
            found[kind].index_copy_(0, rows, copies.index_select(0, places))

    def give_back(self, places: Tensor) -> None:
        """Places whose copies have been read."""
        self._free[self.left : self.left + len(places)] = places
        self.used -= len(places)


class SnapshotMemory:
    """Memory for copies of rows, which one snapshot after the other uses.

    It is taken at once, and not when the first row is copied: memory that is new to a process costs several times as
    much time as a copy, which updates would wait for, and it could run out in the middle of a training.

    Args:
        optimizer: whose rows are copied. budget: bytes; never more than all rows take.
    """

    def __init__(self, optimizer: SparseCPUAdam, budget: int) -> None:
        planes, rows = {}, Counter()
        for table in optimizer.tables():
            kinds = optimizer.saved_planes(table)
            planes[_layout(kinds)] = kinds
            rows[_layout(kinds)] += table.owned.stop - table.owned.start
        share = min(1.0, budget / max(1, sum(count * _row_bytes(planes[layout]) for layout, count in rows.items())))
        self._rooms = {layout: _Room(planes[layout], int(share * count)) for layout, count in rows.items()}

    def room_for(self, planes: dict[str, Tensor]) -> _Room:
        """Where rows like these are copied to."""
        return self._rooms[_layout(planes)]

    @property
    def used(self) -> int:
        """Bytes."""
        return sum(room.used * room.row_bytes for room in self._rooms.values())

    @property
    def nbytes(self) -> int:
        """In all."""
        return sum((room.used + room.left) * room.row_bytes for room in self._rooms.values())

    def clear(self) -> None:
        """Forget all copies."""
        for room in self._rooms.values():
            room.clear()


@dataclass
class _OfTable:
    """How far a table has been read, and what was copied of the rest."""

    planes: dict[str, Tensor]
    blocks: list[slice]
    unread: Tensor
    """[r] bool: rows of this rank that are neither read nor copied."""
    place: Tensor
    """[r] int32: where the copy of a row is in ``room``; -1: nowhere."""
    room: _Room | None


class RowSnapshot:
    """All rows that this rank owns, with lower planes, moments and steps.

    Args:
        optimizer: of the rows, which are up to date.
        memory: for copies; ``None``: nothing changes until all is read.

    Rows are read by :meth:`take`, by one thread and in the order of :meth:`blocks`. Whoever changes rows meanwhile
    calls :meth:`preserve` first, which the tables see to.
    """

    def __init__(self, optimizer: SparseCPUAdam, memory: SnapshotMemory | None = None) -> None:
        self._memory, self._most_used = memory, 0
        self._changed = threading.Condition()
        self._closed = False
        self._tables: dict[str, tuple[PartiallyOffloadedTensor, _OfTable]] = {}
        self._buffers: dict[str, Tensor] = {}
        for table in optimizer.tables():
            planes = optimizer.saved_planes(table)
            blocks = pieces(table.owned, max(_row_bytes({kind: plane}) for kind, plane in planes.items()), _BLOCK_BYTES)
            unread = torch.zeros(table.rows, dtype=torch.bool)
            unread[table.owned] = True
            place = torch.full((table.rows,), -1, dtype=torch.int32)
            room = memory.room_for(planes) if memory is not None else None
            self._tables[table.name] = (table, _OfTable(planes, blocks, unread, place, room))
            if memory is not None:
                table.before_change = self.preserve

    def blocks(self) -> Iterator[Block]:
        """Table by table, from the first row on."""
        for table, part in self._tables.values():
            for rows in part.blocks:
                yield Block(table, rows)

    def kinds(self, table: PartiallyOffloadedTensor) -> dict[str, Tensor]:
        """What there is of a table, by kind; for shapes and types, not for what is in it."""
        return self._tables[table.name][1].planes

    @property
    def most_copied(self) -> int:
        """Bytes of copies at the worst time so far."""
        return self._most_used

    def take(self, block: Block) -> dict[str, Tensor]:
        """A block's rows as they were, by kind, until the next is taken; from now on they may change."""
        part = self._tables[block.table.name][1]
        if self._memory is None:
            return {kind: plane[block.rows] for kind, plane in part.planes.items()}
        # What changes meanwhile was copied before, and is put right below.
        found = {kind: self._buffer(kind, plane[block.rows]) for kind, plane in part.planes.items()}
        with self._changed:
            part.unread[block.rows] = False
            self._changed.notify_all()
        place = part.place[block.rows]
        rows = (place >= 0).nonzero().flatten()
        if rows.numel():
            places = place[rows].long()
            part.room.bring(places, found, rows)
            with self._changed:
                part.room.give_back(places)
                self._changed.notify_all()
        return found

    def preserve(self, table: PartiallyOffloadedTensor, rows: Tensor | slice, beat: Callable[[], None]) -> None:
        """Copy what is yet to be read of some rows, or wait until it has been; ``beat`` is called from time to time."""
        part = self._tables[table.name][1]
        if isinstance(rows, slice):
            rows = torch.arange(table.rows)[rows]
        with self._changed:
            while True:
                rows = rows[part.unread[rows]]
                if self._closed or not rows.numel():
                    return
                self._copy(part, self._affordable(part, rows))
                if not part.unread[rows].any():
                    return
                beat()
                self._changed.wait(_WAIT)

    def close(self) -> None:
        """Forget everything; tables may change freely again."""
        with self._changed:
            self._closed = True
            for table, part in self._tables.values():
                table.before_change = None
                part.unread.fill_(False)
            if self._memory is not None:
                self._memory.clear()
            self._buffers.clear()
            self._changed.notify_all()

    def _buffer(self, kind: str, rows: Tensor) -> Tensor:
        """A copy of these rows in memory that was in use before."""
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.dtype != rows.dtype or buffer.numel() < rows.numel():
            buffer = self._buffers[kind] = torch.empty(rows.numel(), dtype=rows.dtype)
        return buffer[: rows.numel()].view(rows.shape).copy_(rows)

    @staticmethod
    def _affordable(part: _OfTable, rows: Tensor) -> Tensor:
        """Those of the rows that may be copied now. The last ones first: they would wait for the longest time."""
        return rows.sort().values[max(0, rows.numel() - part.room.left) :]

    def _copy(self, part: _OfTable, rows: Tensor) -> None:
        part.place[rows] = part.room.keep(part.planes, rows).int()
        part.unread[rows] = False
        self._most_used = max(self._most_used, self._memory.used)


def _row_bytes(planes: dict[str, Tensor]) -> int:
    return sum(plane[:1].numel() * plane.element_size() for plane in planes.values())


def _layout(planes: dict[str, Tensor]) -> tuple:
    return tuple((kind, plane.shape[1:], plane.dtype) for kind, plane in planes.items())
