"""Rows of a host table in slots on a device: which are there, which slots to give away, and the copies.

In PyTorch; ``kernels/triton/gather.py`` does the same in one launch, without the host having to know how many rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FREE = torch.iinfo(torch.int32).max


@dataclass
class Residency:
    """Which rows of a table [r, d] are in which of S slots. All of it is on the device."""

    slot_of_row: Tensor
    """[r] int32: −1 where a row is in none."""
    row_of_slot: Tensor
    """[S] int32: −1 where a slot is free."""
    used: Tensor
    """[S] int32: when a slot's row was last asked for."""
    version_of_row: Tensor
    """[r] int32: whoever changes a row on the host counts it up."""
    version_of_slot: Tensor
    """[S] int32: of the row, when it was copied."""
    now: int = 0
    """Calls of :func:`gather` so far."""

    @classmethod
    def empty(cls, rows: int, slots: int, device: torch.device | str) -> Residency:
        """Of ``slots`` slots that are free."""

        def of(count: int, value: int) -> Tensor:
            return torch.full((count,), value, dtype=torch.int32, device=device)

        return cls(of(rows, -1), of(slots, -1), of(slots, 0), of(rows, 0), of(slots, 0))


class OwnedRows(NamedTuple):
    """Rows of a table [r, d] that the device owns: what the host has of them may be old."""

    table: Tensor
    """[H, d] of the table's dtype."""
    place_of_row: Tensor
    """[r] int32, or longer: where a row is in it; −1: the host's."""


@dataclass(frozen=True)
class Gathered:
    """Where the active rows are now."""

    slots: Tensor
    """[U'] int32: the slot of each, −1 where none was left; and then some slot or other."""
    copied: Tensor
    """[U'] int32: 1 where the row was brought from the host, 2 where from the rows that the device owns."""
    counts: Tensor
    """[5] int32: rows that were there, that were not, that were there and out of date, for which no slot was left (of
    those that were not there), and that were brought from the rows that the device owns."""

    @classmethod
    def room(cls, most: int, device: torch.device | str) -> Gathered:
        """For what is to be found out."""
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in (most, most, 5)))


def plan(
    rows: Tensor, count: Tensor, residency: Residency, found: Gathered, owned: OwnedRows | None = None
) -> tuple[Tensor, Tensor]:
    """Decide where the active rows shall be, as :func:`gather` does, and note it; nothing is copied.

    Returns:
        [n] and [m] int64: which of the ``rows`` have to be copied to their slots from the host, and which from those
        that the device owns.
    """
    active = rows[: int(count)].long()
    residency.now += 1
    slots, version = residency.slot_of_row[active], residency.version_of_row[active]
    there = slots >= 0
    held = slots[there].long()
    stale = torch.zeros_like(there)
    stale[there] = residency.version_of_slot[held] != version[there]
    residency.used[held] = residency.now

    free = residency.row_of_slot < 0
    ages = torch.where(free, _FREE, residency.now - residency.used)
    missing = (~there).nonzero().flatten()
    given = min(missing.numel(), int((ages > 0).sum()))
    victims = ages.argsort(descending=True, stable=True)[:given].sort().values
    left = residency.row_of_slot[victims]
    residency.slot_of_row[left[left >= 0].long()] = -1
    placed = missing[:given]
    slots[placed] = victims.int()
    residency.row_of_slot[victims], residency.used[victims] = active[placed].int(), residency.now
    residency.slot_of_row[active[placed]] = victims.int()

    held = slots >= 0
    residency.version_of_slot[slots[held].long()] = version[held]
    hits, stale_rows = int(there.sum()), int(stale.sum())
    copied = stale.int()
    copied[placed] = 1
    if owned is not None:
        copied[(copied > 0) & (owned.place_of_row[active] >= 0)] = 2
    from_host, from_device = ((copied == source).nonzero().flatten() for source in (1, 2))
    found.slots[: active.numel()], found.copied[: active.numel()] = slots, copied
    found.counts[:] = torch.tensor(
        [hits - stale_rows, missing.numel(), stale_rows, missing.numel() - given, from_device.numel()]
    )
    return from_host, from_device


def gather(
    table: Tensor,
    into: Tensor,
    rows: Tensor,
    count: Tensor,
    residency: Residency,
    found: Gathered,
    owned: OwnedRows | None = None,
) -> None:
    """Bring the active rows to slots: those that are not there, and those that have changed on the host since.

    Slots to give away are the free ones, then exactly the least recently used; ties to the lowest. No slot of a row
    that is asked for is given away; if there are fewer slots than active rows, the last rows get none, which the
    result says.

    Args:
        table: [r, d], which the device can read. into: [S, d] of the same dtype: the slots.
        rows: [U'] of an integer dtype, distinct; count: [1] int32 of them. found: filled in.
        owned: rows that are not brought from the host.
    """
    which, here = plan(rows, count, residency, found, owned)
    into[found.slots[which].long()] = table[rows[which].long()]
    if owned is not None:
        copy_owned(owned, into, rows, here, found)


def copy_owned(owned: OwnedRows, into: Tensor, rows: Tensor, which: Tensor, found: Gathered) -> None:
    """Copy those of the active rows that the device owns, ``which`` [m] int64, to their slots."""
    into[found.slots[which].long()] = owned.table[owned.place_of_row[rows[which].long()].long()]
