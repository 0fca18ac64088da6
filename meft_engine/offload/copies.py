"""Copies between a device and the host that run beside the device's computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from meft_engine.offload.memory import host_zeros
from meft_kernels.dispatch import reads_host


class Copy(Protocol):
    """A copy that has begun."""

    def wait(self) -> None:
        """Wait for its end, after which its source may be changed and, on the host, its result be read."""

    def hold_device(self) -> None:
        """Let whatever the device is told from now on wait for its end."""


class Copies(Protocol):
    """What begins copies; tests have one whose copies are as late as they may be. Those of one method end in the order
    in which they have begun."""

    def to_host(self, into: Tensor, source: Tensor, *, complete: bool = False) -> Copy:
        """Begin to copy from the device into host memory.

        The source is what the device makes of it by everything that it has been told before this call. It may be given
        up at once.

        Args:
            complete: the device is done with the source, and whoever waits for the copy keeps it until then.
        """

    def to_device(self, source: Tensor) -> tuple[Tensor, Copy]:
        """Begin to copy host memory to a new tensor on the device, whatever that is still busy with."""

    def staging(self, count: int, *, pin_memory: bool, huge_pages: bool) -> Tensor:
        """``count`` bytes of host memory to copy from; see :func:`host_zeros`."""

    def read_in_place(self, table: Tensor) -> bool:
        """Whether the device can read a table on the host without its being copied first."""

    def beside(self, work: Callable[[], None], results: Sequence[Tensor], reads: Sequence[Tensor] = ()) -> Copy:
        """Let the device do ``work`` after what it has been told so far, and beside what it will be told.

        Args:
            work: tells the device what to do; it reads and writes what the caller keeps until the copy has ended.
            results: what it sets. reads: of what it reads there, what the device may change; not before the copy's end.
        """


class CudaCopies:
    """Copies on two streams, one a direction, and work on a third. Memory that is not pinned is waited for at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Work waits for the computation, and what is copied up shall not wait with it.
        self._down, self._up, self._beside = (torch.cuda.Stream(device) for _ in range(3))

    def to_host(self, into: Tensor, source: Tensor, *, complete: bool = False) -> Copy:
        """See :class:`Copies`."""
        if not complete:
            self._down.wait_stream(torch.cuda.current_stream(self._device))
            # Else its memory would be given to the next tensor of the computation, which does not wait for this stream.
            source.record_stream(self._down)
        with torch.cuda.stream(self._down):
            into.copy_(source, non_blocking=True)
        return _CudaCopy(self._down, None, self._device)

    def to_device(self, source: Tensor) -> tuple[Tensor, Copy]:
        """See :class:`Copies`."""
        # Allocated on this stream: memory of another would first have to be given up by what runs there.
        with torch.cuda.stream(self._up):
            into = torch.empty_like(source, device=self._device)
            into.copy_(source, non_blocking=True)
        return into, _CudaCopy(self._up, into, self._device)

    def staging(self, count: int, *, pin_memory: bool, huge_pages: bool) -> Tensor:
        """See :class:`Copies`."""
        # A thread that has not said which device it means would pin it for the first one, and take memory there.
        with torch.cuda.device(self._device):
            return host_zeros((count,), torch.uint8, pin_memory=pin_memory, huge_pages=huge_pages)

    def read_in_place(self, table: Tensor) -> bool:
        """See :class:`Copies`."""
        return table.is_pinned() and reads_host(self._device)

    def beside(self, work: Callable[[], None], results: Sequence[Tensor], reads: Sequence[Tensor] = ()) -> Copy:
        """See :class:`Copies`."""
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            work()
        return _CudaCopy(self._beside, None, self._device)


class _CudaCopy:
    """What a stream has been told so far."""

    def __init__(self, stream: torch.cuda.Stream, result: Tensor | None, device: torch.device) -> None:
        # Whoever waits sleeps: threads that wait must not take the cores from those that work.
        self._ended = stream.record_event(torch.cuda.Event(blocking=True))
        self._result, self._device = result, device

    def wait(self) -> None:
        self._ended.synchronize()

    def hold_device(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._ended)
        if self._result is not None:
            # It dies here, and not on the stream that it was allocated on.
            self._result.record_stream(stream)
            self._result = None


def copies_beside(device: torch.device) -> Copies | None:
    """What begins copies to and from a device, or ``None`` where there is nothing to copy or nobody knows how."""
    return CudaCopies(device) if device.type == "cuda" else None
