"""The thread that updates rows: its order, who waits for it, and that nothing that befalls it is lost."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from meft_engine.cores import rank_cores
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.updates import StaleRowsError
from meft_engine.optim.sparse_adam import NonFiniteRowsError, SparseCPUAdam
from meft_engine.optim.worker import UpdateError, UpdateWorker

ROWS, WIDTH = 11, 5
# Long enough that nothing here takes so long, short enough that a test which hangs ends.
PATIENCE = 20.0


def make_table(name: str = "t", **kwargs) -> PartiallyOffloadedTensor:
    kwargs = {"device": "cpu", "compute_dtype": torch.float32, "resident": True, **kwargs}
    return PartiallyOffloadedTensor(name, ROWS, WIDTH, **kwargs)


class Update:
    """Sets all of a table to a number once it may; notes where it ran."""

    def __init__(
        self,
        table: PartiallyOffloadedTensor,
        number: float = 1.0,
        gate: threading.Event | None = None,
        inside: Callable[[], None] = lambda: None,
        log: list | None = None,
    ) -> None:
        self.table, self.number, self.gate, self.inside = table, number, gate, inside
        self.log = log if log is not None else []
        self.started = threading.Event()

    def run(self, beat: Callable[[], None]) -> None:
        self.started.set()
        while self.gate is not None and not self.gate.wait(0.005):
            beat()
        with self.table.writing():
            high = self.table.row_table(None, None, None).high  # the rows themselves, without waiting
            high[: ROWS // 2] = self.number
            self.inside()
            high[ROWS // 2 :] = self.number
        self.log.append((self.table.name, self.number, threading.current_thread()))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What holds updates up; open at the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def worker() -> Iterator[UpdateWorker]:
    made = UpdateWorker(PATIENCE)
    yield made
    made._closing = True
    made._thread.join(timeout=0)


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    return thread, found


def test_updates_run_in_order_on_one_other_thread(worker):
    tables, log = [make_table(name) for name in "abc"], []
    order = [(i % 3, float(i)) for i in (4, 2, 0, 1, 5, 3, 7, 6)]
    worker.submit(Update(tables[i], number, log=log) for i, number in order[:5])
    worker.submit([Update(tables[i], number, log=log) for i, number in order[5:]])
    worker.drain()
    assert [(name, number) for name, number, _ in log] == [("abc"[i], number) for i, number in order]
    threads = {thread for _, _, thread in log}
    assert len(threads) == 1 and threading.current_thread() not in threads
    worker.close()
    assert not threads.pop().is_alive()


READERS = {
    "gather": lambda table: table.gather(torch.arange(ROWS)),
    "compute_copy": lambda table: table.compute_copy().clone(),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_waits_for_its_own_table_only(worker, gate, reader):
    """Those before it in the queue are waited for, those behind it are not."""
    first, held, idle = (make_table(name) for name in ("first", "held", "idle"))
    worker.submit([Update(first, 3.0), Update(held, 5.0, gate)])
    read = READERS[reader]
    assert (read(idle) == 0).all() and (read(first) == 3).all()
    thread, found = in_background(lambda: read(held))
    thread.join(timeout=0.2)
    assert thread.is_alive() and not found
    gate.set()
    thread.join(timeout=PATIENCE)
    assert (found[0] == 5).all()
    worker.close()


def test_a_reader_never_sees_half_an_update_and_an_update_waits_for_a_reader(worker):
    """Also where a reader may be an update behind."""
    table, half, go_on = make_table(max_staleness=1), threading.Event(), threading.Event()
    worker.submit([Update(table, 1.0, inside=lambda: (half.set(), go_on.wait(PATIENCE)))])
    assert half.wait(PATIENCE)
    thread, found = in_background(lambda: table.gather(torch.arange(ROWS), latest=False))
    thread.join(timeout=0.1)
    assert thread.is_alive()
    go_on.set()
    thread.join(timeout=PATIENCE)
    assert (found[0] == 1).all()
    worker.drain()
    update = Update(table, 2.0)
    with table.reading(latest=False) as rows:
        worker.submit([update])
        assert update.started.wait(PATIENCE)
        time.sleep(0.05)
        assert (rows == 1).all() and not update.log
    assert (table.compute_copy() == 2).all()
    worker.close()


def raises_error() -> None:
    raise ArithmeticError("two times two is five")


def exits() -> None:
    sys.exit("enough of this")


def every_later_use(worker: UpdateWorker, damaged: PartiallyOffloadedTensor) -> list[Callable[[], object]]:
    return [
        worker.check,
        worker.drain,
        lambda: worker.submit([Update(make_table("other"))]),
        lambda: damaged.gather(torch.tensor([0])),
        lambda: damaged.compute_copy(),
        worker.close,
        worker.check,
    ]


@pytest.mark.parametrize("blow, word", [(raises_error, "two times two is five"), (exits, "enough of this")])
def test_a_failure_is_raised_where_rows_are_waited_for_and_ever_after(worker, blow, word):
    """With the traceback of the thread, and for the tables that were still to come."""
    table, behind = make_table("damaged"), make_table("behind")
    worker.submit([Update(table, inside=blow), Update(behind)])
    started = time.monotonic()
    for use in (lambda: behind.gather(torch.tensor([0])), *every_later_use(worker, table)):
        with pytest.raises(UpdateError, match=f"(?s)resume from a checkpoint.*in {blow.__name__}.*{word}"):
            use()
    assert time.monotonic() - started < PATIENCE / 2
    worker._thread.join(timeout=PATIENCE)
    assert not worker._thread.is_alive() and (behind.row_table(None, None, None).high == 0).all()


def test_a_hang_is_told_within_the_timeout():
    """Of a tenth of a second; the message says where the thread is. Once it moves again, so does training."""
    go_on, table, behind = threading.Event(), make_table("stuck"), make_table("behind")
    worker = UpdateWorker(0.1)

    def sleeps() -> None:
        go_on.wait(PATIENCE)

    worker.submit([Update(table, 4.0, inside=sleeps), Update(behind)])
    started = time.monotonic()
    try:
        for use in (lambda: behind.gather(torch.tensor([0])), *every_later_use(worker, table)[:5]):
            with pytest.raises(UpdateError, match=r"(?s)no sign of life for \S+ s .*worker_timeout = 0.1\).*in sleeps"):
                use()
        assert 0.1 < time.monotonic() - started < PATIENCE / 4
    finally:
        go_on.set()
    deadline = time.monotonic() + PATIENCE
    while worker._running is not None or worker._queue:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.close()
    assert (table.compute_copy() == 4).all() and not worker._thread.is_alive()


def test_a_slow_update_that_gives_signs_of_life_is_waited_for():
    gate, table, worker = threading.Event(), make_table(), UpdateWorker(0.1)
    worker.submit([Update(table, 2.0, gate)])
    threading.Timer(0.5, gate.set).start()
    assert (table.compute_copy() == 2).all()
    worker.close()


def test_idle_time_is_no_silence():
    """Neither before the first update nor between two."""
    table, worker = make_table(), UpdateWorker(0.1)
    for number in (1.0, 2.0):
        time.sleep(0.25)
        worker.check()
        worker.submit([Update(table, number)])
        assert (table.compute_copy() == number).all()
    worker.close()


def test_a_table_is_unreadable_after_an_update_that_failed_midway():
    """Without a worker, where the failure itself was raised at once; also where rows may be an update old."""
    table = make_table("damaged", max_staleness=1)
    table.expect_update(None)
    with pytest.raises(ArithmeticError):
        Update(table, inside=raises_error).run(lambda: None)
    for latest in (True, False):
        with pytest.raises(StaleRowsError, match="rows of damaged are only half updated; an update failed"):
            table.gather(torch.tensor([0]), latest=latest)
    with pytest.raises(StaleRowsError):
        table.compute_copy()


@pytest.mark.parametrize("with_worker", [False, True])
def test_rows_that_leave_their_range_are_an_error_that_names_the_table(with_worker):
    table = make_table("layer/keys", compute_dtype=torch.bfloat16)
    table.fill(torch.full((ROWS, WIDTH), 3.38e38))
    optimizer = SparseCPUAdam([table], lr=1e37)
    table.accumulate(torch.tensor([2, 9]), torch.tensor([[-1.0], [1.0]]).expand(2, WIDTH))
    sentence = "1 rows of layer/keys left the range of torch.bfloat16 in an update; .*smaller learning rate"
    if not with_worker:
        with pytest.raises(NonFiniteRowsError, match=sentence):
            optimizer.step()
        with pytest.raises(StaleRowsError, match="half updated"):
            table.compute_copy()
        return
    worker = UpdateWorker(PATIENCE)
    worker.submit(optimizer.updates())
    with pytest.raises(UpdateError, match=f"(?s){sentence}"):
        table.compute_copy()
    with pytest.raises(UpdateError):
        worker.close()


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_reader_may_be_one_update_behind_where_that_is_allowed(worker, gate, max_staleness):
    """It counts such reads; who asks for the latest rows waits in any case."""
    table, other = make_table(max_staleness=max_staleness), make_table("other")
    worker.submit([Update(other, 1.0, gate), Update(table, 7.0)])
    thread, found = in_background(lambda: table.gather(torch.tensor([0]), latest=False))
    thread.join(timeout=PATIENCE if max_staleness else 0.2)
    assert thread.is_alive() == (max_staleness == 0)
    assert (table.updates.reads, table.updates.stale_reads) == ((1, 1) if max_staleness else (0, 0))
    waiting, latest = in_background(lambda: table.gather(torch.tensor([0])))
    waiting.join(timeout=0.1)
    assert waiting.is_alive()
    gate.set()
    for one in (thread, waiting):
        one.join(timeout=PATIENCE)
    assert (found[0] == (0 if max_staleness else 7)).all() and (latest[0] == 7).all()
    table.gather(torch.tensor([0]), latest=False)
    assert (table.updates.reads, table.updates.stale_reads) == (3, max_staleness)
    worker.close()


def test_two_updates_behind_is_too_many(worker, gate):
    table = make_table(max_staleness=1)
    worker.submit([Update(table, 1.0, gate), Update(table, 2.0, gate)])
    thread, found = in_background(lambda: table.gather(torch.tensor([0]), latest=False))
    thread.join(timeout=0.2)
    assert thread.is_alive()
    gate.set()
    thread.join(timeout=PATIENCE)
    assert (found[0] >= 1).all()
    worker.close()


def test_drain_waits_for_everything_and_close_finishes_it(worker, gate):
    log, table = [], make_table()
    worker.drain()
    worker.submit([Update(table, 1.0, gate, log=log), Update(table, 2.0, log=log)])
    thread, _ = in_background(worker.drain)
    thread.join(timeout=0.1)
    assert thread.is_alive() and not log
    gate.set()
    thread.join(timeout=PATIENCE)
    assert len(log) == 2
    worker.submit([Update(table, float(i), log=log) for i in range(3, 9)])
    worker.close()
    assert [number for _, number, _ in log] == [float(i) for i in range(1, 9)]
    assert not worker._thread.is_alive()
    worker.close()
    worker.drain()


def test_a_delayed_worker_changes_no_bit():
    """Random delays, reads in between: the results are those of updates that are done when a step returns."""

    def train(worker: UpdateWorker | None) -> list[Tensor]:
        torch.manual_seed(5)
        delays = torch.Generator().manual_seed(7)
        kinds = {"device": "cpu", "compute_dtype": torch.bfloat16, "resident": False}
        tables = [PartiallyOffloadedTensor(name, 29, 33, **kinds) for name in "abc"]
        for table in tables:
            table.fill(torch.randn(29, 33))
        settings = {"mode": "dense_equivalent", "moments_dtype": torch.bfloat16, "weight_decay": 0.1}
        optimizer, seen = SparseCPUAdam(tables, lr=0.05, **settings), []
        for _ in range(12):
            if worker is not None:
                worker.drain()
            for table in tables:
                rows = torch.randperm(29)[:7]
                table.accumulate(rows, torch.randn(7, 33))
            if worker is None:
                optimizer.step()
            else:
                worker.submit(Delayed(update, delays) for update in optimizer.updates())
            optimizer.zero_grad()
            seen += [table.gather(torch.randperm(29)[:9]) for table in tables]
        if worker is not None:
            worker.close()
        return seen + [x for t in tables for x in (t.master, *optimizer.state[t.handle].values())]

    expected, found = train(None), train(UpdateWorker(PATIENCE))
    assert len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class Delayed:
    """An update that begins up to 10 ms late."""

    def __init__(self, update, generator: torch.Generator) -> None:
        self.update, self.table = update, update.table
        self.delay = 0.01 * float(torch.rand((), generator=generator))

    def run(self, beat: Callable[[], None]) -> None:
        time.sleep(self.delay)
        self.update.run(beat)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind threads to cores")
def test_the_thread_may_use_the_cores_of_the_process_though_its_parent_may_not():
    """A training thread bound to one core, as launchers and OpenMP bind it, must not bind the updates too."""
    table, seen = make_table(), []
    mine, everyone = os.sched_getaffinity(0), rank_cores()
    assert mine <= everyone
    resting = threading.Event()
    other, _ = in_background(lambda: resting.wait(PATIENCE))  # keeps the cores of the process in sight
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert rank_cores() == everyone
        for cores in (None, {max(mine)}):
            worker = UpdateWorker(PATIENCE, cores)
            worker.submit([Update(table, inside=lambda: seen.append(os.sched_getaffinity(0)))])
            worker.close()
    finally:
        os.sched_setaffinity(0, mine)
        resting.set()
    assert seen == [everyone, {max(mine)}]


def test_a_write_waits_for_what_is_due_and_later_readers_do_too(worker, gate):
    table = make_table()
    worker.submit([Update(table, 1.0, gate)])
    threading.Timer(0.05, gate.set).start()
    table.write(torch.tensor([2]), torch.full((1, WIDTH), 5.0))
    assert table.master[:, 0].tolist() == [5.0 if row == 2 else 1.0 for row in range(ROWS)]
    worker.submit([Update(table, 3.0)])
    assert (table.compute_copy() == 3.0).all()


def test_only_setting_all_rows_mends_a_table_that_an_update_left_half_written():
    table = make_table(max_staleness=1)
    table.expect_update(None)
    with pytest.raises(OSError), table.writing():
        raise OSError
    with pytest.raises(StaleRowsError, match="half updated"):
        table.write(torch.tensor([2]), torch.ones(1, WIDTH))
    for latest in (True, False):
        with pytest.raises(StaleRowsError, match="half updated"):
            table.gather(torch.tensor([2]), latest=latest)
    table.fill(torch.full((ROWS, WIDTH), 4.0))
    assert (table.gather(torch.arange(ROWS)) == 4.0).all()


def test_nothing_can_be_submitted_to_a_closed_worker():
    closed, table = UpdateWorker(PATIENCE), make_table()
    closed.close()
    with pytest.raises(UpdateError, match="closed"):
        closed.submit([Update(table)])
    assert (table.compute_copy() == 0).all()
