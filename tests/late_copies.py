"""A device whose copies are as late as they may be, for tests without one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from tests import late_passes


class LateCopies:
    """Copies that are made when they are waited for, and not before; until then nobody can use what they fill.

    So where a wait is missing, NaN or an impossible row arrives; where a source is changed too early, its new contents.
    Host memory that is used again before somebody has waited for the copy's end is refused. As on a stream, what was
    begun earlier in the same direction is made first.

    Args:
        in_place: whether the device can read tables on the host.
        early: the other extreme: copies are made at once, so that what they overwrite too early is gone.
    """

    def __init__(self, *, in_place: bool = True, early: bool = False) -> None:
        self.begun, self.ended, self.in_place, self._early = 0, 0, in_place, early
        self._reading: list[_LateCopy] = []
        self._streams: dict[str, deque[_LateCopy]] = {name: deque() for name in ("down", "up", "beside")}
        self._lock = threading.RLock()

    def to_host(self, into: Tensor, source: Tensor, *, complete: bool = False) -> _LateCopy:
        """See :class:`meft_engine.offload.copies.Copies`."""
        return self._begin("down", lambda: into.copy_(source), [into])

    def to_device(self, source: Tensor) -> tuple[Tensor, _LateCopy]:
        """See :class:`meft_engine.offload.copies.Copies`."""
        into = torch.empty_like(source)
        copy = self._begin("up", lambda: into.copy_(source), [into], source)
        with self._lock:
            self._reading.append(copy)
        return into, copy

    def staging(self, count: int, *, pin_memory: bool, huge_pages: bool) -> Tensor:
        """See :class:`meft_engine.offload.copies.Copies`."""
        return torch.zeros(count, dtype=torch.uint8)

    def read_in_place(self, table: Tensor) -> bool:
        """See :class:`meft_engine.offload.copies.Copies`."""
        return self.in_place

    def beside(self, work: Callable[[], None], results: Sequence[Tensor], reads: Sequence[Tensor] = ()) -> _LateCopy:
        """See :class:`meft_engine.offload.copies.Copies`."""
        versions = [tensor._version for tensor in reads]

        def unchanged() -> None:
            # Who changes it meanwhile would change some of it before the copy, on a card, and some behind.
            assert versions == [tensor._version for tensor in reads], "the device changed what a copy still read"
            work()

        return self._begin("beside", unchanged, results)

    def _begin(
        self, stream: str, work: Callable[[], object], results: Sequence[Tensor], source: Tensor | None = None
    ) -> _LateCopy:
        for into in results:
            into.fill_(torch.nan if into.is_floating_point() else -1)
        with self._lock:
            self.begun += 1
            self._check()
            copy = _LateCopy(self, stream, work, source)
            self._streams[stream].append(copy)
            if self._early:
                self.make(copy)
            return copy

    def make(self, copy: _LateCopy) -> None:
        """What has been begun is done now, at the latest moment."""
        with self._lock:
            while not copy.made:
                earliest = self._streams[copy.stream].popleft()
                earliest.work()
                earliest.made, earliest.work = True, None

    def end(self, copy: _LateCopy) -> None:
        """Nobody reads the copy's source any more."""
        with self._lock:
            self.ended += 1
            self._check()
            self._reading = [other for other in self._reading if other is not copy]

    def _check(self) -> None:
        """Refuse sources that have been changed while copies of them may still have been running."""
        for copy in self._reading:
            assert copy.source._version == copy.version, "host memory was used again before its copy had ended"


class _LateCopy:
    def __init__(self, copies: LateCopies, stream: str, work: Callable[[], object], source: Tensor | None) -> None:
        self._copies, self.stream, self.work, self.source, self.made = copies, stream, work, source, False
        self.version = source._version if source is not None else 0

    def wait(self) -> None:
        self._copies.make(self)
        self._copies.end(self)

    def hold_device(self) -> None:
        """What the host does next stands for what the device is told next."""
        self._copies.make(self)


def use_late_device(
    patch: Callable[[str, object], None],
    *,
    in_place: bool = True,
    early: bool = False,
    late_passes: ModuleType | None = late_passes,
) -> None:
    """Place models that are built from now on on such a device, which alone knows how many rows are active.

    Args:
        patch: sets an attribute by its dotted name.
        late_passes: what computes there; ``None``: what computes here.
    """
    patch("meft_engine.offload.traffic.copies_beside", lambda device: LateCopies(in_place=in_place, early=early))
    for module in ("module", "routing") if late_passes is not None else ():
        patch(f"meft_engine.adapter.{module}.token_passes", lambda device: late_passes)
