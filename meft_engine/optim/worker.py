"""The thread that updates rows while the training thread goes on."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

from meft_engine.cores import rank_cores

_POLL, _POLL_OF_OTHERS = 0.02, 0.0005


class UpdateError(RuntimeError):
    """The thread that updates rows failed, ended or hangs; the message holds its traceback."""


class Update(Protocol):
    """What the worker runs: an update of one table, which calls ``beat`` from time to time."""

    table: object

    def run(self, beat: Callable[[], None]) -> None: ...


class UpdateWorker:
    """Runs updates one after the other, in the order in which they were submitted, on a thread of its own.

    The results do not depend on it: whoever reads a table waits for the updates of that table.

    Args:
        timeout: seconds without a sign of life during an update after which a waiting thread gives up.
        cores: the cores that the thread and those that it starts may use; ``None``: those of the process.
        check_others: where other ranks update rows too: raises if one of them is lost.
    """

    def __init__(
        self, timeout: float, cores: set[int] | None = None, check_others: Callable[[], None] | None = None
    ) -> None:
        self._timeout, self._cores = timeout, cores or rank_cores()
        self._check_others = check_others
        # Nobody on this side notices when another rank has written.
        self._poll = _POLL if check_others is None else _POLL_OF_OTHERS
        self._changed = threading.Condition()
        self._queue: deque[Update] = deque()
        self._running: Update | None = None
        self._beat_at = time.monotonic()
        self._failure: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="meft-row-updates", daemon=True)
        self._thread.start()

    def submit(self, updates: Iterable[Update]) -> None:
        """Announce the updates to their tables and run them in this order.

        Raises:
            UpdateError: if the worker has failed or been closed.
        """
        self.check()
        with self._changed:
            if self._closing:
                raise UpdateError("the thread that updates rows has been closed, and nothing can be submitted to it")
            if not self._queue and self._running is None:
                self._beat_at = time.monotonic()
            for update in updates:
                update.table.expect_update(self.wait)
                self._queue.append(update)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Block until ``condition()`` is true.

        Raises:
            UpdateError: if the worker failed, ended, or has given no sign of life for the timeout.
        """
        if condition():
            return
        with self._changed:
            while not condition():
                self.check()
                self._changed.wait(self._poll)

    def drain(self) -> None:
        """Block until every update that was submitted is done.

        Raises:
            UpdateError: as :meth:`wait`.
        """
        self.wait(lambda: not self._queue and self._running is None and self._failure is None)

    def check(self) -> None:
        """Raise if the worker cannot do its work.

        Raises:
            UpdateError: with the thread's traceback.
            RankLostError: if another rank is lost.
        """
        if self._check_others is not None:
            self._check_others()
        if self._failure is not None:
            raise UpdateError(
                f"a row update failed, so that rows are damaged; resume from a checkpoint\n{self._failure}"
            )
        waiting = bool(self._queue) or self._running is not None
        if not self._thread.is_alive() and (waiting or not self._closing):
            raise UpdateError("the thread that updates rows has ended, so that rows are old; resume from a checkpoint")
        silent = time.monotonic() - self._beat_at
        if waiting and silent > self._timeout:
            frame = sys._current_frames().get(self._thread.ident)
            where = "".join(traceback.format_stack(frame)) if frame is not None else ""
            raise UpdateError(
                f"the row update has given no sign of life for {silent:.1f} s (optimizer.worker_timeout = "
                f"{self._timeout:g}); raise the timeout if the machine is merely slow\n{where}"
            )

    def close(self) -> None:
        """Finish what was submitted and end the thread.

        Raises:
            UpdateError: if that is not possible.
        """
        try:
            self.drain()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join(timeout=self._timeout)

    def _beat(self) -> None:
        self._beat_at = time.monotonic()

    def _work(self) -> None:
        # The training thread may be bound to one core; what it starts inherits that.
        with suppress(AttributeError, OSError):
            os.sched_setaffinity(0, self._cores)
        try:
            while (update := self._next()) is not None:
                update.run(self._beat)
                update = None  # or it would keep its table alive until the next one
                with self._changed:
                    self._running = None
                    self._beat()
                    self._changed.notify_all()
        except BaseException:  # SystemExit too: the training thread has to hear of everything
            self._failure = traceback.format_exc()
        finally:
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> Update | None:
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            self._running = self._queue.popleft()
            self._beat()
            return self._running
