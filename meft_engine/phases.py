"""Where a training step's time goes, by named phases; the names also mark profiles.

Times are exclusive: a phase that runs inside another is charged for itself, so that all of them add up to the time that
has passed. They are the training thread's; what another thread does meanwhile does not show.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

REST = "other"
"""What no phase covers: data loading, the script's own code."""


class PhaseClock:
    """Seconds by phase, from its making on."""

    def __init__(self) -> None:
        self._open = [REST]
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def begin(self, name: str) -> None:
        """From now on time is charged to ``name``."""
        self._charge()
        self._open.append(name)

    def end(self, name: str) -> None:
        """``name`` is over, and with it what was begun inside and never ended; does nothing if it was not begun."""
        if name not in self._open[1:]:
            return
        self._charge()
        while self._open.pop() != name:
            pass

    def is_open(self, name: str) -> bool:
        """Whether it has begun and not ended."""
        return name in self._open

    def seconds(self) -> dict[str, float]:
        """Of every phase that has occurred so far."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = time.perf_counter()
        current = self._open[-1]
        self._seconds[current] = self._seconds.get(current, 0.0) + now - self._since
        self._since = now


_clock: PhaseClock | None = None


def use_clock(clock: PhaseClock | None) -> None:
    """Charge the phases that follow to ``clock``: an engine's, while its step runs; ``None`` for nobody's."""
    global _clock
    _clock = clock


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge what happens inside to ``name``, and name it ``meft::name`` in profiles."""
    clock = _clock
    if clock is not None:
        clock.begin(name)
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(f"meft::{name}")
    try:
        with torch.profiler.record_function(f"meft::{name}"):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        if clock is not None:
            clock.end(name)
