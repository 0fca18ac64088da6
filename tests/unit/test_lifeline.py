"""Ranks that die, hang or end, in processes of their own: whom the others name, how soon, and how they stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meft_engine.parallel.lifeline import EXIT_CODE, Lifeline, RankLostError, listen

ROOT = Path(__file__).resolve().parents[2]
# Long enough that a rank is not taken for a lost one because a busy machine does not let it run.
TIMEOUT = 4.0
# Silence counts after 0.7 of it; what was waited is read on the rank's own clock, a little later where it is busy.
SOON, LATE = 0.6 * TIMEOUT, 2 * TIMEOUT
TOKEN = "the token of this job"
END = "; stopping. The last checkpoint is as it was written."

START = """
import logging, os, signal, socket, sys, time
from meft_engine.parallel.lifeline import Lifeline

logging.basicConfig(format="%(message)s")
rank, world, port, fd, timeout = int(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5])
listener = socket.socket(fileno=fd) if rank == 0 else None
names = [f"rank {i} (host h{i})" for i in range(world)]
lifeline = Lifeline(rank, names, ("127.0.0.1", port), sys.argv[6], timeout, listener=listener)
print("up", flush=True)
"""
# As in a collective that never ends; sleep is resumed after signals.
BLOCKED = "lifeline.mark(2, 0, inside=True); time.sleep(60)"
CHECKS = "while True: lifeline.check(); time.sleep(0.01)"


class Job:
    """Ranks as processes, each of which runs a snippet with ``lifeline`` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks, self.port = folder, {}, 0

    def start(self, *snippets: str | None, timeout: float = TIMEOUT) -> None:
        """Start a rank for each snippet (none for ``None``) and wait until all are connected."""
        with listen() as listener:
            self.port = listener.getsockname()[1]
            for rank, snippet in enumerate(snippets):
                if snippet is None:
                    continue
                script = self.folder / f"rank{rank}.py"
                script.write_text(START + snippet)
                arguments = [rank, len(snippets), self.port, listener.fileno(), timeout, TOKEN]
                with (self.folder / f"{rank}.log").open("w") as log:
                    self.ranks[rank] = subprocess.Popen(
                        [sys.executable, str(script), *map(str, arguments)],
                        env={**os.environ, "PYTHONPATH": str(ROOT)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self.folder,
                        pass_fds=[listener.fileno()] if rank == 0 else [],
                        start_new_session=True,  # so that what a rank forks is ended with it
                    )
        wait_until(lambda: all("up" in self.log(rank) for rank in self.ranks), 60)
        time.sleep(min(1.0, timeout / 8))  # a beat, in which rank 0 takes the connections

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            self.ranks[rank].send_signal(number)

    def codes(self, *ranks: int, within: float = 10 * TIMEOUT) -> list[int]:
        """The exit codes of these ranks, which end within so many seconds from now.

        What is said, not when, tells here how a loss was noticed; :mod:`tests.ranks.test_faults` looks at the clock.
        """
        deadline = time.monotonic() + within
        return [self.ranks[rank].wait(timeout=max(0.001, deadline - time.monotonic())) for rank in ranks]

    def verdicts(self, *ranks: int) -> set[str]:
        """What these ranks log of others, each once."""
        lines = {rank: [line for line in self.log(rank).splitlines() if line.endswith(END)] for rank in ranks}
        logged = {rank: [line for line in lines[rank] if "RankLostError" not in line] for rank in ranks}
        assert all(len(logged[rank]) == 1 for rank in ranks), lines
        return {logged[rank][0].removesuffix(END) for rank in ranks}

    def silent(self, *ranks: int) -> bool:
        """Whether these ranks have said nothing but that they are up."""
        return all(self.log(rank) == "up\n" for rank in ranks)

    def end(self) -> None:
        for process in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said_for(line: str, before: str) -> float:
    """The seconds in a verdict that begins like this."""
    assert line.startswith(before), line
    return float(line.removeprefix(before).split()[0])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    running = Job(tmp_path)
    yield running
    running.end()


@pytest.mark.parametrize("lost", [0, 2])
def test_rank_that_is_killed_is_named_at_once(job: Job, lost: int) -> None:
    job.start(BLOCKED, BLOCKED, BLOCKED, BLOCKED, timeout=60)
    others = [rank for rank in range(4) if rank != lost]
    job.signal(signal.SIGKILL, lost)
    assert job.codes(*others, within=40) == [EXIT_CODE] * 3
    assert job.verdicts(*others) == {f"rank {lost} (host h{lost}) died"}


def test_ranks_that_die_together_are_all_named(job: Job) -> None:
    job.start(BLOCKED, BLOCKED, BLOCKED, BLOCKED)
    job.signal(signal.SIGKILL, 1, 3)
    assert job.codes(0, 2) == [EXIT_CODE] * 2
    (verdict,) = job.verdicts(0, 2)
    assert sorted(verdict.split("; ")) == ["rank 1 (host h1) died", "rank 3 (host h3) died"]


@pytest.mark.parametrize("lost", [[0], [1, 2]])
def test_ranks_that_are_stopped_are_named(job: Job, lost: list[int]) -> None:
    job.start(*[BLOCKED] * (len(lost) + 2))
    others = [rank for rank in job.ranks if rank not in lost]
    job.signal(signal.SIGSTOP, *lost)
    assert job.codes(*others) == [EXIT_CODE] * 2
    for verdict in job.verdicts(*others):  # without rank 0, each has a clock of its own
        named = verdict.split("; ")
        assert len(named) == len(lost)
        for rank, line in zip(lost, named, strict=True):
            silent = said_for(line, f"rank {rank} (host h{rank}) has given no sign of life for ")
            assert SOON < silent < LATE


def test_all_ranks_stopped_at_once_go_on_together(job: Job) -> None:
    goes_on = """
while not os.path.exists("end"):
    lifeline.check()
    time.sleep(0.01)
lifeline.close()
"""
    job.start(goes_on, goes_on, goes_on)
    job.signal(signal.SIGSTOP, 0, 1, 2)
    time.sleep(1.1 * TIMEOUT)
    for rank in (1, 2, 0):
        job.signal(signal.SIGCONT, rank)
        time.sleep(0.05)
    time.sleep(0.3 * TIMEOUT)
    (job.folder / "end").touch()
    assert job.codes(0, 1, 2) == [0] * 3
    assert job.silent(0, 1, 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_training_thread_that_hangs_is_named(job: Job, lost: int) -> None:
    snippets = [BLOCKED] * 3
    snippets[lost] = "lifeline.mark(1, 3, inside=False); time.sleep(60)"
    job.start(*snippets)
    assert job.codes(0, 1, 2) == [EXIT_CODE] * 3
    (verdict,) = job.verdicts(0, 1, 2)
    waited = said_for(verdict, f"rank {lost} (host h{lost}) has not come beyond (1, 3) for ")
    assert SOON < waited < LATE
    assert verdict.endswith("while others wait for it at (2, 0)") and "; " not in verdict


def test_ranks_that_are_slow_or_have_ended_beyond_are_not_named(job: Job) -> None:
    waits = f"lifeline.mark(9, 0, inside=True); time.sleep({1.5 * TIMEOUT}); lifeline.check(); lifeline.close()"
    moves = f"""
for place in range(6):
    lifeline.mark(8, place, inside=True)
    time.sleep({0.25 * TIMEOUT})
lifeline.close()
"""
    has_left = "lifeline.mark(9, 0, inside=True); lifeline.mark(9, 0, inside=False)"
    job.start(waits, waits, moves, has_left)
    assert job.codes(0, 1, 2, 3) == [0] * 4
    assert job.silent(0, 1, 2, 3)


def test_exception_is_told_to_the_others(job: Job) -> None:
    job.start(BLOCKED, "time.sleep(0.5)\nraise ValueError('bad batch\\nof two lines')", CHECKS)
    assert job.codes(0, 1, 2) == [EXIT_CODE, 1, 1]
    assert job.verdicts(0, 1, 2) == {"rank 1 (host h1) ended with ValueError: bad batch"}
    assert "RankLostError: rank 1 (host h1) ended with" in job.log(2)  # which check() raised


@pytest.mark.parametrize("victim", [0, 2])
def test_rank_that_fails_because_another_died_is_not_blamed(job: Job, victim: int) -> None:
    # As in a collective: over a connection of their own, which ends with the process a little before the lifeline's.
    dies = """
server = socket.socket(socket.AF_UNIX)
server.bind("collective")
server.listen()
connection, _ = server.accept()
os.dup2(connection.fileno(), 0)
connection.close()
time.sleep(60)
"""
    fails = """
while not os.path.exists("collective"): time.sleep(0.01)
connection = socket.socket(socket.AF_UNIX)
time.sleep(0.1)
connection.connect("collective")
print("connected", flush=True)
if not connection.recv(1): raise RuntimeError("Connection closed by peer")
"""
    snippets = [BLOCKED] * 3
    snippets[1], snippets[victim] = dies, fails
    job.start(*snippets)
    wait_until(lambda: "connected" in job.log(victim), 60)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(victim, 2 - victim) == [1, EXIT_CODE]
    assert job.verdicts(0, 2) == {"rank 1 (host h1) died"}
    assert "RuntimeError: Connection closed by peer" in job.log(victim)


def test_ranks_that_end_well_are_not_lost(job: Job) -> None:
    goes_on = "time.sleep(0.8); lifeline.check(); lifeline.close()"
    job.start(goes_on, "lifeline.close(); lifeline.close()", "pass", "sys.exit(4)", goes_on)
    assert job.codes(0, 1, 2, 3, 4) == [0, 0, 0, 4, 0]
    assert job.silent(0, 1, 2, 3, 4)


@pytest.mark.parametrize("lost", [0, 1])
def test_others_do_not_wait_for_ever_for_a_rank_that_has_ended(job: Job, lost: int) -> None:
    snippets = [BLOCKED] * 3
    snippets[lost] = "lifeline.mark(1, 3, inside=False); time.sleep(0.5)"
    job.start(*snippets)
    others = [rank for rank in range(3) if rank != lost]
    assert job.codes(lost) == [0]
    assert job.codes(*others) == [EXIT_CODE] * 2
    assert job.verdicts(*others) == {f"rank {lost} (host h{lost}) has ended, while others wait for it"}


def test_strangers_are_dropped_and_do_no_harm(job: Job) -> None:
    job.start(BLOCKED, BLOCKED, BLOCKED)
    sent = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 50_000 + b"\n",
        b"x" * 200_000,
        json.dumps({"kind": "hello", "rank": 1, "token": "a guess"}).encode() + b"\n",
        json.dumps({"kind": "hello", "rank": 1}).encode() + b"\n",
        json.dumps({"kind": "hello", "rank": True, "token": TOKEN}).encode() + b"\n",
        json.dumps({"kind": "hello", "rank": 7, "token": TOKEN}).encode() + b"\n",
        json.dumps({"kind": "hello", "rank": 1, "token": TOKEN}).encode() + b"\n",  # rank 1 is connected already
        json.dumps({"kind": "verdict", "text": "all is lost"}).encode() + b"\n",
        b"",  # says nothing
    ]
    strangers = [socket.create_connection(("127.0.0.1", job.port), timeout=TIMEOUT) for _ in sent]
    try:
        for stranger, data in zip(strangers, sent, strict=True):
            with contextlib.suppress(ConnectionError):
                stranger.sendall(data)
        for index, stranger in enumerate(strangers):
            if index < len(sent) - 1:  # only silence takes a while
                stranger.settimeout(TIMEOUT / 4)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(100) == b""
    finally:
        for stranger in strangers:
            stranger.close()
    assert all(process.poll() is None for process in job.ranks.values()) and job.silent(0, 1, 2)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(0, 2) == [EXIT_CODE] * 2
    assert job.verdicts(0, 2) == {"rank 1 (host h1) died"}


def test_garbage_from_a_rank_is_passed_over(job: Job) -> None:
    job.start(BLOCKED, None, BLOCKED)
    for token in ("a guess", "", None, 5, "é", "\ud800"):
        with socket.create_connection(("127.0.0.1", job.port), timeout=TIMEOUT / 4) as stranger:
            stranger.sendall(json.dumps({"kind": "hello", "rank": 1, "token": token}).encode() + b"\n")
            assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", job.port)) as connection:
        connection.sendall(json.dumps({"kind": "hello", "rank": 1, "token": TOKEN}).encode() + b"\n")
        connection.sendall(b"\xff\x00\n7\n{}\n\n[[1]]\n" + b"[" * 50_000 + b'\n{"kind": "beat", "position": 5}\n')
        time.sleep(TIMEOUT / 4)
        assert all(process.poll() is None for process in job.ranks.values()) and job.silent(0, 2)
    assert job.codes(0, 2) == [EXIT_CODE] * 2
    assert job.verdicts(0, 2) == {"rank 1 (host h1) died"}


@pytest.mark.parametrize("lost", [0, 1])
def test_forked_child_does_not_hide_the_death_of_its_rank(job: Job, lost: int) -> None:
    snippets = [BLOCKED] * 3
    snippets[lost] = "print('child', pid, flush=True) if (pid := os.fork()) else None; time.sleep(60)"
    job.start(*snippets, timeout=60)
    wait_until(lambda: "child" in job.log(lost), 60)
    others = [rank for rank in range(3) if rank != lost]
    job.signal(signal.SIGKILL, lost)
    assert job.codes(*others, within=40) == [EXIT_CODE] * 2
    assert job.verdicts(*others) == {f"rank {lost} (host h{lost}) died"}
    os.kill(int(job.log(lost).split()[-1]), 0)  # the child is still there


def test_child_forked_while_a_connection_is_accepted_does_not_hide_the_death_of_its_rank(job: Job) -> None:
    # The system has made the connection, and the thread that takes it does not get to run until the child is there.
    forks = """
accept = socket.socket.accept
def accept_slowly(listener):
    accepted = accept(listener)
    open("accepted", "w").close()
    time.sleep(2)
    return accepted
socket.socket.accept = accept_slowly
print("ready", flush=True)
while not os.path.exists("accepted"): time.sleep(0.01)
print('child', pid, flush=True) if (pid := os.fork()) else None; time.sleep(60)
"""
    job.start(forks, None, timeout=60)
    wait_until(lambda: "ready" in job.log(0), 60)
    with socket.create_connection(("127.0.0.1", job.port), timeout=10) as connection:
        connection.sendall(json.dumps({"kind": "hello", "rank": 1, "token": TOKEN}).encode() + b"\n")
        wait_until(lambda: "child" in job.log(0), 60)
        job.signal(signal.SIGKILL, 0)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    os.kill(int(job.log(0).split()[-1]), 0)  # the child is still there


def test_end_of_a_forked_child_is_nothing(job: Job) -> None:
    forks = """
if not (pid := os.fork()):
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
    sys.exit(0)
os.waitpid(pid, 0)
time.sleep(0.5)
lifeline.check()
"""
    job.start("time.sleep(0.5); lifeline.check()", forks)
    assert job.codes(0, 1) == [0, 0]
    assert job.silent(0, 1)


def test_rank_that_never_connects_is_named(job: Job) -> None:
    job.start(BLOCKED, None, BLOCKED)
    assert job.codes(0, 2) == [EXIT_CODE] * 2
    (verdict,) = job.verdicts(0, 2)
    waited = said_for(verdict, "rank 1 (host h1) has not connected to rank 0 (host h0) for ")
    assert SOON < waited < LATE and "; " not in verdict


def test_rank_0_that_cannot_be_reached_is_named() -> None:
    with listen() as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RankLostError, match=rf"^rank 0 cannot be reached at 127\.0\.0\.1:{port} \("):
        Lifeline(1, ["rank 0", "rank 1"], ("127.0.0.1", port), TOKEN, TIMEOUT)


def test_full_pipe_does_not_keep_a_rank_from_stopping(job: Job) -> None:
    fills = """
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while True: os.write(write, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(write, True)
os.dup2(write, 2)
"""
    job.start(fills + BLOCKED, BLOCKED)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(0) == [EXIT_CODE]


def test_closing_in_time_lets_a_rank_clean_up(job: Job) -> None:
    cleans = f"""
try:
    while True: lifeline.check(); time.sleep(0.01)
except RuntimeError:
    lifeline.close()
    time.sleep({0.5 * TIMEOUT})
    sys.exit(3)
"""
    job.start(cleans, BLOCKED)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(0) == [3]


def test_rank_whose_end_hangs_is_ended(job: Job) -> None:
    hangs = "class Slow:\n    def __del__(self): time.sleep(60)\nslow = Slow()\n"
    job.start(hangs + CHECKS, BLOCKED)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(0) == [-signal.SIGALRM]
    assert job.verdicts(0) == {"rank 1 (host h1) died"}


def test_check_waits_for_the_news(job: Job) -> None:
    job.start("lifeline.check(wait=30)", BLOCKED)
    job.signal(signal.SIGKILL, 1)
    assert job.codes(0) == [1]
    assert job.verdicts(0) == {"rank 1 (host h1) died"}


def test_one_rank_starts_nothing() -> None:
    threads, listener = threading.active_count(), listen()
    lifeline = Lifeline(0, ["rank 0"], listener.getsockname(), TOKEN, TIMEOUT, listener=listener)
    assert threading.active_count() == threads and listener.fileno() == -1
    lifeline.mark(1, 2, inside=True)
    lifeline.check(wait=5)
    lifeline.close()
