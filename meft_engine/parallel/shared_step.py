"""What an optimizer step over rows takes where several ranks share them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import RowUpdate, SparseCPUAdam
from meft_engine.parallel.exchange import GradientExchange
from meft_engine.parallel.publisher import RowPublisher
from meft_engine.parallel.ranks import Ranks
from meft_engine.parallel.sharding import owned_rows


class SharedRows:
    """Sums gradients at the rows' owners before an update, and brings what was updated to other nodes after it.

    Args:
        tables: of all adapters, as the forward meets them. expert_rows: rows of an expert.
        dtype: of gradients on their way. factor: what their sums are multiplied by.
    """

    def __init__(
        self,
        ranks: Ranks,
        tables: Iterable[PartiallyOffloadedTensor],
        expert_rows: int,
        *,
        dtype: torch.dtype,
        factor: float,
    ) -> None:
        tables = list(tables)
        owned = [owned_rows(table.rows, expert_rows, ranks.size) for table in tables]
        self.exchange = GradientExchange(ranks, tables, owned, dtype=dtype, factor=factor)
        self.publisher = RowPublisher(ranks) if len(ranks.nodes) > 1 else None
        self._index = {table.name: index for index, table in enumerate(tables)}
        self._touched: Tensor | None = None

    def gradient_norm(self, optimizer: SparseCPUAdam) -> float:
        """2-norm of the rows' gradients over all ranks, which are at their owners from then on."""
        facts = self.exchange.run(optimizer.squared_gradient_norm)
        self._touched = facts.touched
        return facts.norm

    def with_publication(self, updates: Iterable[RowUpdate], optimizer: SparseCPUAdam) -> list[RowUpdate]:
        """The updates, which send their rows to other nodes as soon as they are done."""
        updates = list(updates)
        if self.publisher is not None:
            for update in updates:
                touched = self._touched[:, self._index[update.table.name]].tolist()
                update.publish = functools.partial(self._publish, optimizer, touched)
        return updates

    def _publish(
        self, optimizer: SparseCPUAdam, touched: list[int], update: RowUpdate, beat: Callable[[], None]
    ) -> None:
        table = update.table
        parts = table.row_table(**optimizer.state[table.handle])
        planes = [part for part in parts if part is not None] if table.shard.shares_state else [parts.high]
        self.publisher.publish(table, planes, update.rows, touched, beat)
