"""Row gradients on their way from the device to the host, while the backward of earlier layers goes on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from meft_engine.cores import rank_cores
from meft_engine.offload.copies import Copies, Copy

MOST_UNDER_WAY = 4
"""Gradients that may be on their way: each keeps its tensor on the device and as much memory on the host."""


class GradientReturn:
    """Begins the copies, and adds what has arrived on a thread, in the order in which it was sent.

    Args:
        copies: begins a copy.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._pool = ThreadPoolExecutor(1, "meft-gradients", initializer=_use_all_cores)
        self._sent: deque[Future[None]] = deque()
        self._largest, self._most = 0, 0

    def send(
        self,
        rows: Tensor,
        grad: Tensor,
        squared_norms: Tensor | None,
        count: Tensor | None,
        room: Callable[..., Tensor],
        add: Callable[[Tensor, Tensor, Tensor | None], None],
    ) -> None:
        """Bring a gradient to the host and call ``add`` with what arrives; waits while too many are on their way.

        Args:
            rows: [n] int64. grad: [n, d] float32. squared_norms: [n] float64 or ``None``. None of them is changed from
                now on. count: [1] int32, of the rows that there are, the first ones; ``None``: all. room: gives memory
                [m, d] float32 on the host.
        """
        self._largest = max(self._largest, grad.nbytes)
        while len(self._sent) >= MOST_UNDER_WAY:
            self._sent.popleft().result()
        sources = [rows, grad] if squared_norms is None else [rows, grad, squared_norms]
        if count is None:
            arriving, copies = self._begin(sources, room, complete=False)
        else:
            number, counted = self._begin([count], room, complete=False)

        def arrive() -> None:
            nonlocal arriving, copies
            if count is not None:
                # How many there are is known only now, and the device has found the rest before the number.
                for copy in counted:
                    copy.wait()
                found = int(number[0])
                with torch.cuda.device_of(grad):  # or memory would be pinned for the first one, and some taken there
                    arriving, copies = self._begin([source[:found] for source in sources], room, complete=True)
            for copy in copies:
                copy.wait()
            add(*arriving, *[None] * (3 - len(arriving)))

        self._sent.append(self._pool.submit(arrive))
        self._most = max(self._most, len(self._sent))

    def most_bytes(self) -> int:
        """The most device memory that gradients under way, and two that are about to be sent, can have taken so far."""
        return (self._most + 2) * self._largest if self._most else 0

    def _begin(
        self, sources: list[Tensor], room: Callable[..., Tensor], *, complete: bool
    ) -> tuple[list[Tensor], list[Copy]]:
        arriving = [
            room(*source.shape)
            if source.dtype == torch.float32
            else torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
            for source in sources
        ]
        pairs = zip(arriving, sources, strict=True)
        return arriving, [self._copies.to_host(into, source, complete=complete) for into, source in pairs]

    def drain(self) -> None:
        """Wait until everything that was sent has been added; raises what went wrong."""
        while self._sent:
            self._sent.popleft().result()

    def close(self) -> None:
        """End the thread, once it has added what was sent."""
        self._pool.shutdown()


def _use_all_cores() -> None:
    # The training thread may be bound to one core; what it starts inherits that.
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, rank_cores())
