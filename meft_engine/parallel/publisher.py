"""Updated rows go to the nodes whose ranks read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.parallel.ranks import Ranks

_ROUND_BYTES = 64 << 20
_ID = torch.int32


class RowPublisher:
    """Brings rows that one rank has updated to every other node, to one rank each, which writes them there.

    It works on the thread that updates rows, in the process group of a column, table after table in the order of the
    forward; all ranks of the column take part, also with no rows of their own.

    Args:
        round_bytes: about how much a rank sends at once.
    """

    def __init__(self, ranks: Ranks, *, round_bytes: int = _ROUND_BYTES) -> None:
        self._ranks, self._round_bytes = ranks, round_bytes
        self._members = next(column for column in ranks.columns if ranks.rank in column)
        others = [node for node in ranks.nodes if ranks.rank not in node]
        self._receivers = [ranks.counterpart(ranks.rank, node) for node in others]
        self._senders = [
            rank
            for rank in self._members
            if rank not in ranks.node and ranks.counterpart(rank, ranks.node) == ranks.rank
        ]
        self.bytes_sent = 0
        """To other nodes, since the beginning."""

    def publish(
        self,
        table: PartiallyOffloadedTensor,
        planes: Sequence[Tensor],
        rows: Tensor,
        touched: Sequence[int],
        beat: Callable[[], None],
    ) -> None:
        """Send the planes' ``rows`` and write those of the other nodes' ranks into them.

        Args:
            planes: [r, …] each, of what readers use. rows: [n] int64, updated by this rank.
            touched: how many rows every rank has updated. beat: called while others are waited for.
        """
        sizes = [plane[:1].nbytes for plane in planes]
        a_row = _ID.itemsize + sum(sizes)
        block = max(1, self._round_bytes // (a_row * max(1, len(self._ranks.nodes) - 1)))
        members = self._members
        for start in range(0, max(touched[rank] for rank in members), block):
            own = rows[start : start + block]
            counts = [min(block, max(0, touched[rank] - start)) for rank in members]
            payload = _packed(own, [plane.index_select(0, own) for plane in planes])
            sent = [payload.numel() if rank in self._receivers else 0 for rank in members]
            received = [n * a_row if rank in self._senders else 0 for rank, n in zip(members, counts, strict=True)]
            found = torch.empty(sum(received), dtype=torch.uint8)
            with self._ranks.communicating():
                self._send(found, payload.repeat(len(self._receivers)), received, sent, beat)
            for count, part in zip(counts, found.split(received), strict=True):
                if part.numel():
                    table.refresh(self._unpack(part, count, planes))

    def _send(
        self, found: Tensor, payload: Tensor, received: list[int], sent: list[int], beat: Callable[[], None]
    ) -> None:
        work = dist.all_to_all_single(found, payload, received, sent, group=self._ranks.publishing_group, async_op=True)
        self.bytes_sent += sum(sent)
        while not work.is_completed():
            beat()
            time.sleep(2e-4)
        work.wait()

    def _unpack(self, part: Tensor, count: int, planes: Sequence[Tensor]) -> Tensor:
        """Write what a rank has sent into the planes; returns its rows."""
        start = count * _ID.itemsize
        # Copied, since a part of the buffer need not be aligned for numbers of several bytes.
        rows = part[:start].clone().view(_ID).long()
        for plane in planes:
            stop = start + count * plane[:1].nbytes
            values = part[start:stop].clone().view(plane.dtype).view(count, *plane.shape[1:])
            plane.index_copy_(0, rows, values)
            start = stop
        return rows


def _packed(rows: Tensor, planes: Sequence[Tensor]) -> Tensor:
    parts = [rows.to(_ID), *planes]
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
