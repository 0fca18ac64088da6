"""Who may read a table when: which updates of it are expected, which are done, and who is in it just now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meft_engine.offload.shard import Shard, Wait
from meft_engine.phases import phase


class StaleRowsError(RuntimeError):
    """Rows were read that an update has replaced since they were first read, or that are only half updated."""


class Updates:
    """The order of a table's readers and writers.

    Updates may run on another thread. It says so beforehand (:meth:`expect`) and writes inside :meth:`writing`; whoever
    reads waits for what is expected, and never sees a row half written. Where several ranks train, every update of the
    table is expected by all of them, of whomever's rows it is.

    Args:
        name: what error messages call the table.
        max_staleness: how many updates a reader may be behind where it does not ask for the latest rows.
        shard: where updates of other ranks are counted; ``None``: all of them are this process's.
    """

    def __init__(self, name: str, max_staleness: int, shard: Shard | None) -> None:
        self._name, self._max_staleness, self._shard = name, max_staleness, shard
        self.expected = 0
        """Updates so far, those included that are not yet done."""
        self.reads, self.stale_reads = 0, 0
        self._done, self._torn = 0, False
        self._lock = threading.RLock()
        self._wait = shard.wait if shard is not None else None

    def expect(self, wait: Wait | None) -> None:
        """Announce an update. ``wait(condition)`` blocks until the condition holds, or raises where it never will;
        ``None``: this thread is about to carry it out."""
        self.expected += 1
        self._wait = wait if wait is not None or self._shard is None else self._shard.wait

    @contextmanager
    def reading(self, *, latest: bool = True) -> Iterator[None]:
        """While inside, no update touches the table.

        Args:
            latest: wait for every update that is expected; else ``max_staleness`` may be missing.

        Raises:
            StaleRowsError: if an update failed midway.
            UpdateError: if the thread that should update cannot.
        """
        allowed = 0 if latest else self._max_staleness
        if self._wait is None:
            self._lock.acquire()
        elif self._behind() > allowed or not self._lock.acquire(blocking=False):
            with phase("wait"):
                self._wait(lambda: self._behind() <= allowed)
                self._wait(lambda: self._lock.acquire(blocking=False))
        try:
            behind = self._behind()
            if self._torn or behind > allowed:
                what = "only half updated" if self._torn else f"{behind} updates old, where {allowed} are allowed"
                raise StaleRowsError(f"rows of {self._name} are {what}; an update failed or did not run")
            self.reads += 1
            self.stale_reads += behind > 0
            yield
        finally:
            self._lock.release()

    @contextmanager
    def writing(self, begin: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Carry out an update that was announced. If it raises, the table is unreadable from then on; ``begin`` is
        called before anything is written, and may raise."""
        with self._lock:
            begin()
            self._torn = True
            yield
            self._note_done(self._done + 1)
            self._torn = False

    def forgive(self) -> None:
        """All that an update left which failed midway is about to be replaced; otherwise, does nothing."""
        if self._torn and self._lock.acquire(blocking=False):
            self._torn = False
            self._note_done(self.expected)
            self._lock.release()

    def _behind(self) -> int:
        """How many of the expected updates are not yet there, on whichever rank of the node."""
        done = self._done if self._shard is None else int(self._shard.written.min())
        return self.expected - done

    def _note_done(self, count: int) -> None:
        self._done = count
        if self._shard is not None:
            self._shard.written[self._shard.place] = count
