"""Which rank owns which rows, and where the tables' shared parts lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_engine.offload.shard import Shard
from meft_engine.parallel.arena import NodeMemory, bytes_taken
from meft_engine.parallel.ranks import Ranks


@dataclass(frozen=True)
class TablePlan:
    """A table that is going to be built: r rows of experts_rows each expert, ``width`` wide."""

    rows: int
    expert_rows: int
    width: int
    on_device: bool
    """Whether a device has copies of rows of it."""


def owned_rows(rows: int, expert_rows: int, ranks: int) -> list[slice]:
    """The rows of every rank: whole experts, in order, as many to each as can be; some get none if experts are few."""
    experts = rows // expert_rows
    ends = [experts * rank // ranks * expert_rows for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


class Sharding:
    """Gives every table its shard; every rank has to construct it and to ask for the tables in the same order.

    Args:
        plans: of all tables, in the order in which they will be built.
        compute_dtype: of the compute copies. moments_dtype: of the moments.
        shares_state: whether moments and lower planes are shared on the node (see :class:`Shard`).
    """

    def __init__(
        self,
        ranks: Ranks,
        plans: Sequence[TablePlan],
        *,
        compute_dtype: torch.dtype,
        moments_dtype: torch.dtype,
        shares_state: bool,
        pin_memory: bool,
        huge_pages: bool,
    ) -> None:
        self._ranks, self._plans, self._shares_state = ranks, list(plans), shares_state
        members = len(ranks.node)
        shapes: list[tuple[Sequence[int], torch.dtype]] = [((len(plans), members), torch.int64)]
        for plan in plans:
            shapes.append(((plan.rows, plan.width), compute_dtype))
            if plan.on_device:
                shapes.append(((plan.rows,), torch.int32))
            if shares_state:
                shapes += [((plan.rows, plan.width), torch.int16), ((plan.rows,), torch.int32)]
                shapes += [((plan.rows, plan.width), moments_dtype)] * 2
        self._memory = NodeMemory(ranks, bytes_taken(shapes), pin_memory=pin_memory, huge_pages=huge_pages)
        self._written: Tensor = self._memory.take(*shapes[0])

    def shard(self, index: int) -> Shard:
        """Of the table at ``index`` of the plans."""
        plan, ranks = self._plans[index], self._ranks
        owned = owned_rows(plan.rows, plan.expert_rows, ranks.size)
        node = ranks.node
        fills = [
            owned[other]
            for other in range(ranks.size)
            if other == ranks.rank or (other not in node and ranks.counterpart(other, node) == ranks.rank)
        ]
        shard = Shard(
            owned=owned[ranks.rank],
            fills=fills,
            allocate=lambda shape, dtype, present: self._memory.take(shape, dtype, present),
            written=self._written[index],
            place=ranks.local_rank,
            wait=ranks.wait,
            shares_state=self._shares_state,
            ranks_of_node=len(node),
        )
        if plan.on_device:
            shard.changed_at = shard.allocate((plan.rows,), torch.int32, fills)
        return shard
