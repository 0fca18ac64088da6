"""Row gradients go to the ranks that own the rows, and what all ranks have to know of a step comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.parallel.ranks import Ranks
from meft_kernels.dispatch import row_passes

_BUCKET_BYTES = 256 << 20
_ALIGNMENT = 8
_ID = torch.int32


class StepFacts(NamedTuple):
    """What every rank knows of a step once gradients are where they belong."""

    norm: float
    """2-norm of all rows' gradients; not finite if any of them is not."""
    touched: Tensor
    """[ranks, tables] int64: how many rows of each table every rank is about to update."""


class GradientExchange:
    """Sums row gradients over the ranks, each row's at its owner.

    Every rank sends the owner of a row its id and gradient; nothing goes out for rows that a rank did not touch. The
    owner adds what it gets in the order of the ranks, so that the sum is the same however the messages arrive.

    Args:
        tables: of which each has its shard, in an order that is the same on all ranks.
        owned: the rows that each rank owns, of each table.
        dtype: of gradients on their way, ``torch.float32`` or ``torch.bfloat16``; sums are in fp32.
        factor: what sums are multiplied by, such as 1 / ranks for a mean.
        bucket_bytes: about how much a rank sends in one collective.
    """

    def __init__(
        self,
        ranks: Ranks,
        tables: Sequence[PartiallyOffloadedTensor],
        owned: Sequence[Sequence[slice]],
        *,
        dtype: torch.dtype,
        factor: float,
        bucket_bytes: int = _BUCKET_BYTES,
    ) -> None:
        self._ranks, self._tables, self._dtype, self._factor = ranks, list(tables), dtype, factor
        self._ends = [torch.tensor([part.stop for part in parts]) for parts in owned]
        self._bucket_bytes = bucket_bytes
        self.bytes_sent = 0
        """To other ranks, since the beginning: ids, gradients and how many there are of them."""

    def run(self, squared_norm: Callable[[], float]) -> StepFacts:
        """Replace what each table has accumulated by the sum over all ranks for the rows that this rank owns.

        Every rank has to call it, whether it touched anything or not. When it returns, all ranks have ended the
        backward that read the rows.

        Args:
            squared_norm: of the gradients that the tables then have.
        """
        outgoing = [self._sorted(table, ends) for table, ends in zip(self._tables, self._ends, strict=True)]
        counts = torch.stack([counts for _, _, counts in outgoing], dim=1)  # [ranks, tables]
        incoming = torch.empty_like(counts)
        with self._ranks.communicating():
            dist.all_to_all_single(incoming, counts, group=self._ranks.group)
        self.bytes_sent += counts[:1].nbytes * (self._ranks.size - 1)
        for bucket in self._buckets(counts):
            self._exchange(bucket, outgoing, counts.tolist(), incoming.tolist())
        own = [squared_norm(), *(float(self._touched(table)) for table in self._tables)]
        found = self._ranks.gather(torch.tensor(own, dtype=torch.float64))
        self.bytes_sent += found[0].nbytes * (self._ranks.size - 1)
        total = float(found[:, 0].sum())
        touched = found[:, 1:].long()
        for table, anywhere in zip(self._tables, (touched.sum(0) > 0).tolist(), strict=True):
            if anywhere and table.gradient() is None:
                # All ranks announce the update of a table, whoever's rows it is of.
                table.replace_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, table.width))
        return StepFacts(math.sqrt(total) if total >= 0 else math.nan, touched)

    def _sorted(self, table: PartiallyOffloadedTensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A table's rows by id, their gradients, and [ranks] how many go to each owner."""
        gradient = table.gradient()
        table.clear_gradient()
        if gradient is None:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, table.width), torch.zeros_like(ends)
        rows, grad = gradient
        if rows.numel() > 1 and bool((rows[1:] < rows[:-1]).any()):
            order = rows.argsort()
            rows, grad = rows[order], grad[order]
        up_to = torch.searchsorted(rows, ends)
        return rows, grad, up_to.diff(prepend=torch.zeros(1, dtype=torch.int64))

    def _buckets(self, counts: Tensor) -> list[list[int]]:
        """Tables that travel together, the same on all ranks: by the most that any rank has to send of each."""
        most = self._ranks.gather(counts.sum(0)).amax(0)
        self.bytes_sent += most.nbytes * (self._ranks.size - 1)
        buckets: list[list[int]] = []
        room = 0
        for index, rows in enumerate(most.tolist()):
            size = rows * self._row_bytes(index)
            if not size:
                continue
            if not buckets or size > room:
                buckets.append([])
                room = self._bucket_bytes
            buckets[-1].append(index)
            room -= size
        return buckets

    def _row_bytes(self, index: int) -> int:
        return _ID.itemsize + self._tables[index].width * self._dtype.itemsize

    def _exchange(
        self,
        bucket: list[int],
        outgoing: list[tuple[Tensor, Tensor, Tensor]],
        counts: list[list[int]],
        incoming: list[list[int]],
    ) -> None:
        sent, received = self._sizes(bucket, counts), self._sizes(bucket, incoming)
        buffer = torch.empty(sum(sent), dtype=torch.uint8)
        self.bytes_sent += sum(sent) - sent[self._ranks.rank]
        starts = dict.fromkeys(bucket, 0)
        for rank, part in enumerate(buffer.split(sent)):
            for index, ids, grads in self._views(part, bucket, counts[rank]):
                rows, grad, _ = outgoing[index]
                span = slice(starts[index], starts[index] + len(ids))
                ids.copy_(rows[span])
                grads.copy_(grad[span])
                starts[index] = span.stop
        found = torch.empty(sum(received), dtype=torch.uint8)
        with self._ranks.communicating():
            dist.all_to_all_single(found, buffer, received, sent, group=self._ranks.group)
        of_table: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in bucket}
        for rank, part in enumerate(found.split(received)):
            for index, ids, grads in self._views(part, bucket, incoming[rank]):
                if len(ids):
                    of_table[index].append((ids, grads))
        for index, parts in of_table.items():
            if parts:
                self._tables[index].replace_gradient(*self._sum(parts, self._tables[index].threads))

    def _sizes(self, bucket: list[int], counts: list[list[int]]) -> list[int]:
        """Bytes to or from every rank; a multiple of what makes views into the whole aligned."""
        sizes = [sum(of_rank[index] * self._row_bytes(index) for index in bucket) for of_rank in counts]
        return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]

    def _views(self, part: Tensor, bucket: list[int], counts: list[int]) -> list[tuple[int, Tensor, Tensor]]:
        """Of each table in one rank's part: ids [n] int32, which come first, and gradients [n, d]."""
        numbers = [counts[index] for index in bucket]
        ids = part[: sum(numbers) * _ID.itemsize].view(_ID).split(numbers)
        start, views = sum(numbers) * _ID.itemsize, []
        for index, number, own_ids in zip(bucket, numbers, ids, strict=True):
            width = self._tables[index].width
            stop = start + number * width * self._dtype.itemsize
            views.append((index, own_ids, part[start:stop].view(self._dtype).view(number, width)))
            start = stop
        return views

    def _sum(self, parts: list[tuple[Tensor, Tensor]], threads: int) -> tuple[Tensor, Tensor]:
        """Rows [n] int64, ascending, and the sum of their gradients in the order of the parts, times the factor."""
        each = [ids.long() for ids, _ in parts]
        rows = torch.cat(each).unique()
        total, seen = torch.empty(rows.numel(), parts[0][1].shape[1]), torch.zeros(rows.numel(), dtype=torch.bool)
        for ids, (_, grads) in zip(each, parts, strict=True):
            slots = torch.searchsorted(rows, ids)
            fresh = ~seen[slots]
            seen[slots] = True
            row_passes().accumulate_rows(total, slots, fresh, grads.float().contiguous(), threads=threads)
        return rows, total.mul_(self._factor)

    def _touched(self, table: PartiallyOffloadedTensor) -> int:
        gradient = table.gradient()
        return 0 if gradient is None else gradient.rows.numel()
