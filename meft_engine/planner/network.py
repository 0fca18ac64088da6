"""What ranks send to one another in a step."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from meft_engine.parallel.exchange import GradientExchange
from meft_engine.parallel.publisher import RowPublisher

ID_BYTES = 4
COPY_BYTES = 2
"""Of an element of the bf16 compute copy, which is what other nodes get."""

_BUCKET_BYTES = inspect.signature(GradientExchange).parameters["bucket_bytes"].default
_ROUND_BYTES = inspect.signature(RowPublisher).parameters["round_bytes"].default
_COUNT_BYTES = 8


@dataclass(frozen=True)
class Tables:
    """Of an adapter: ``layers`` of a keys and a values table each, of ``rows`` rows of ``width``."""

    width: int
    layers: int
    rows: int

    @property
    def tables(self) -> int:
        """How many there are."""
        return 2 * self.layers

    @property
    def dense_bytes(self) -> int:
        """Of an fp32 gradient of all rows."""
        return self.tables * self.rows * self.width * 4


@dataclass(frozen=True)
class Load:
    """What a rank has to do in a step: of ``shape``, ``touched`` rows of each table, of which ``union`` by any rank."""

    shape: Tables
    ranks: int
    touched: float
    union: float
    wire_bytes: int = 4
    ranks_of_node: int = 8
    copy_bytes: int = COPY_BYTES

    @property
    def nodes(self) -> int:
        """How many there are."""
        return -(-self.ranks // self.ranks_of_node)

    @property
    def gradient_bytes(self) -> float:
        """Of ids and gradients that a rank sends to other owners."""
        row = ID_BYTES + self.shape.width * self.wire_bytes
        return self.shape.tables * self.touched * row * (1 - 1 / self.ranks)

    @property
    def published_bytes(self) -> float:
        """Of ids and rows that a rank sends to other nodes."""
        row = ID_BYTES + self.shape.width * self.copy_bytes
        return self.shape.tables * self.union / self.ranks * row * (self.nodes - 1)

    @property
    def fact_bytes(self) -> float:
        """Of counts, sizes and norms, to all others."""
        return (3 * self.shape.tables + 1) * _COUNT_BYTES * (self.ranks - 1)

    @property
    def bytes(self) -> float:
        """All that a rank sends."""
        return self.gradient_bytes + self.published_bytes + self.fact_bytes

    @property
    def buckets(self) -> int:
        """Into how many all_to_alls the gradients are divided, about."""
        row = ID_BYTES + self.shape.width * self.wire_bytes
        return max(1, math.ceil(self.shape.tables * self.touched * row / _BUCKET_BYTES))

    @property
    def rounds(self) -> int:
        """All_to_alls that publish updated rows, each table's in its own; none on one node."""
        row = ID_BYTES + self.shape.width * self.copy_bytes
        block = max(1, _ROUND_BYTES // (row * max(1, self.nodes - 1)))
        return self.shape.tables * math.ceil(self.union / self.ranks / block) if self.nodes > 1 else 0

    @property
    def messages(self) -> int:
        """How many a rank sends: to all others in every all_to_all of gradients, around the ring in two gathers, and to
        one rank of every other node in those of rows."""
        return (1 + self.buckets + 2) * (self.ranks - 1) + self.rounds * (self.nodes - 1)

    @property
    def dense_bytes(self) -> float:
        """What a rank sends in a ring all-reduce of the gradient of all rows in fp32."""
        return 2 * (1 - 1 / self.ranks) * self.shape.dense_bytes

    @property
    def network_bytes(self) -> float:
        """Out of a node, of all its ranks."""
        if self.nodes == 1:
            return 0.0
        members = self.ranks / self.nodes
        abroad = (self.ranks - members) / (self.ranks - 1)  # of a rank's fellows
        return members * (abroad * (self.gradient_bytes + self.fact_bytes) + self.published_bytes)
