"""Rows and their optimizer state as they are at one moment, read block by block while training goes on.

Copy on write: rows that an update is about to change are copied first, unless they have been read already. What is
copied is bounded; beyond that, the update waits until the reader has come to its rows, which never waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam

_WAIT = 0.02
_BLOCK_BYTES = 1 << 22  # of one kind; an update waits while a block is copied


class Block(NamedTuple):
    """Consecutive rows of a table, which are read together."""

    table: PartiallyOffloadedTensor
    rows: slice


class _Kept(NamedTuple):
    """Copies of some rows of a block, by kind; ``rows`` [n] int64 are places in the table."""

    rows: Tensor
    copies: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(copy.nbytes for copy in self.copies.values())


@dataclass
class _OfTable:
    """How far a table has been read, and what was copied of the rest."""

    planes: dict[str, Tensor]
    blocks: list[slice]
    unread: Tensor
    """[r] bool: rows of this rank that are neither read nor copied."""
    kept: dict[int, list[_Kept]] = field(default_factory=dict)
    """By the start of a block."""


class RowSnapshot:
    """All rows that this rank owns, with lower planes, moments and steps.

    Args:
        optimizer: of the rows, which are up to date.
        budget: bytes of copies at a time; ``None``: nothing changes until all is read.

    Rows are read by :meth:`take`, by one thread and in the order of :meth:`blocks`. Whoever changes rows meanwhile
    calls :meth:`preserve` first, which the tables see to.
    """

    def __init__(self, optimizer: SparseCPUAdam, budget: int | None = None) -> None:
        self._budget, self._used, self._most_used = budget, 0, 0
        self._changed = threading.Condition()
        self._closed = False
        self._tables: dict[str, tuple[PartiallyOffloadedTensor, _OfTable]] = {}
        for table in optimizer.tables():
            planes = optimizer.saved_planes(table)
            row_bytes = max(plane[:1].numel() * plane.element_size() for plane in planes.values())
            blocks = pieces(table.owned, row_bytes, _BLOCK_BYTES)
            unread = torch.zeros(table.rows, dtype=torch.bool)
            unread[table.owned] = True
            self._tables[table.name] = (table, _OfTable(planes, blocks, unread))
            if budget is not None:
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
        """A block's rows as they were, by kind; from now on they may change."""
        part = self._tables[block.table.name][1]
        with self._changed:
            found = {kind: plane[block.rows].clone() for kind, plane in part.planes.items()}
            part.unread[block.rows] = False
            for kept in part.kept.pop(block.rows.start, []):
                for kind, copy in kept.copies.items():
                    found[kind][kept.rows - block.rows.start] = copy
                self._used -= kept.nbytes
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
                part.kept.clear()
                part.unread.fill_(False)
            self._changed.notify_all()

    def _affordable(self, part: _OfTable, rows: Tensor) -> Tensor:
        """Those of the rows that may be copied now. The last ones first: they would wait for the longest time."""
        row_bytes = 8 + sum(plane[:1].numel() * plane.element_size() for plane in part.planes.values())
        count = rows.numel() if self._budget is None else max(0, self._budget - self._used) // row_bytes
        return rows.sort().values[rows.numel() - min(count, rows.numel()) :]

    def _copy(self, part: _OfTable, rows: Tensor) -> None:
        """Keep rows, which ascend, by their blocks."""
        ends = torch.searchsorted(rows, torch.tensor([block.stop for block in part.blocks])).tolist()
        for block, first, last in zip(part.blocks, [0, *ends], ends, strict=False):
            if first < last:
                own = rows[first:last].clone()
                kept = _Kept(own, {kind: plane.index_select(0, own) for kind, plane in part.planes.items()})
                part.kept.setdefault(block.start, []).append(kept)
                self._used += kept.nbytes
        self._most_used = max(self._most_used, self._used)
        part.unread[rows] = False
