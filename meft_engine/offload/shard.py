"""What a table has to know of the other ranks that use it: which rows are whose, and who has written how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Allocate = Callable[[Sequence[int], torch.dtype, Sequence[slice]], Tensor]
Wait = Callable[[Callable[[], bool]], None]


@dataclass
class Shard:
    """One rank's part of a table whose compute copy all ranks of the node share."""

    owned: slice
    """The rows whose masters and moments are here, and which this rank alone updates."""

    fills: list[slice]
    """The rows of the node's copy that this rank writes: its own, and those that ranks of other nodes send it."""

    allocate: Allocate
    """Makes a table in the node's memory, of zeros, whose ``fills`` this rank writes first."""

    written: Tensor
    """[ranks of the node] int64 in the node's memory: how many updates each has written."""

    place: int
    """This rank's element of ``written``."""

    wait: Wait
    """Blocks until a condition holds that other ranks bring about, or raises where one of them is lost."""

    changed_at: Tensor | None = None
    """[r] int32 in the node's memory: the update that last changed a row; only where a device has a copy to refresh."""

    shares_state: bool = False
    """Whether lower planes, moments and steps are in the node's memory too, for rows that readers bring to date."""

    ranks_of_node: int = 1

    def is_owned(self, rows: Tensor) -> Tensor:
        """[n] bool: which of the ``rows`` [n] are this rank's."""
        return (rows >= self.owned.start) & (rows < self.owned.stop)

    def is_filled(self, rows: Tensor) -> Tensor:
        """[n] bool: which of the ``rows`` [n] this rank writes into the node's copy."""
        found = torch.zeros_like(rows, dtype=torch.bool)
        for part in self.fills:
            found |= (rows >= part.start) & (rows < part.stop)
        return found
