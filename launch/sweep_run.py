"""One run of a sweep in its folder: start it or go on with it, stop it when asked, measure it, and say how it ended.

The status file is exchanged in one step, so that whoever reads it reads a whole one. The log is locked by all
processes of a training (their output goes there): as long as one of them lives, no other training starts there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import launcher
from data import DataError
from resuming import newest_whole
from sweep_file import Resources
from sweep_plan import CONFIG, Run, command_options, evaluation_options, read_run

from meft_engine.checkpoint.folders import write_text

STATUS, LOG, EVALUATION_LOG, REPORT = "status.json", "log.txt", "evaluate.log", "train_report.json"
WAITING, RUNNING, INTERRUPTED, FINISHED, FAILED, OVER_BUDGET = (
    *("waiting", "running", "interrupted", "finished", "failed", "over budget"),
)
_POLL, _LOOK, _ASK_AGAIN, _LAST_PROCESSES = 0.2, 5.0, 2.0, 90.0
"""Seconds between two looks at a process; at the budget; between two signals; for what outlives the launcher."""
_PORTS = 12000
# The launcher would die of them, as its ranks would before they train; these set handlers then. A program of its own
# does it, since a process that runs code between fork and exec may be too large to fork.
_DEAF_TO_USER_SIGNALS = """
import os, signal, sys
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    state: str = WAITING
    attempts: int = 0
    seconds: float = 0.0
    """Of training and evaluation, of attempts that have ended."""
    since: float | None = None
    """When the attempt that is running began, by the clock."""
    reason: str = ""
    """Why it did not finish, in one sentence."""
    host: str = ""
    group: int = 0
    """The process group of the training on ``host``."""
    job: str = ""
    """Slurm's name of the job."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What ``evaluate.py`` printed."""

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return self.seconds + (max(0.0, time.time() - self.since) if self.state == RUNNING and self.since else 0.0)


def read_status(folder: Path) -> Status:
    """The status of a run; one that was never started is waiting."""
    try:
        return Status(**json.loads((folder / STATUS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status()


def write_status(folder: Path, status: Status) -> Status:
    """Put it in place in one step."""
    write_text(folder / STATUS, json.dumps(asdict(status), indent=2) + "\n")
    return status


class Stop:
    """Whether this process was asked to stop, by which signal and how often."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def listen(self, *numbers: int) -> None:
        """Remember these signals from now on, in place of what they did."""
        for number in numbers:
            signal.signal(number, lambda received, frame: self.received.append(received))


@dataclass(frozen=True)
class Limits:
    """Seconds that may be spent."""

    run: float | None = None
    total: float | None = None

    def exceeded(self, folder: Path) -> str | None:
        """Which limit the run in ``folder`` has reached, in words; other runs of the sweep are its neighbours."""
        if self.run is not None and read_status(folder).spent >= self.run:
            return f"budget.hours_per_run = {self.run / 3600:g} is spent"
        if self.total is not None:
            spent = sum(read_status(path.parent).spent for path in folder.parent.glob(f"*/{STATUS}"))
            if spent >= self.total:
                return f"budget.hours_total = {self.total / 3600:g} is spent"
        return None


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, and which of them this is."""

    hosts: tuple[str, ...] = ("localhost",)
    rank: int = 0
    job: str = ""


def trained(folder: Path) -> dict[str, Any] | None:
    """The report of a training that is done."""
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def execute(folder: Path, resources: Resources, limits: Limits, stop: Stop, nodes: Nodes = Nodes()) -> Status:  # noqa: B008
    """Run it to its end, or until it is asked to stop; on nodes other than the first, only train.

    Returns:
        the status, which is also in the folder.
    """
    former = read_status(folder)
    if former.state == FINISHED:
        return former
    first = nodes.rank == 0
    with _open_log(folder, nodes) as log:
        if _wait_for_leftovers(log, former, stop):
            former = replace(former, seconds=former.spent)
        reason = limits.exceeded(folder) if first else None
        if first:
            now = replace(former, state=RUNNING, reason="", attempts=former.attempts + 1, since=time.time())
            now = replace(now, host=socket.gethostname(), group=0, job=nodes.job)
        else:
            now = former
        if stop.received:
            return _end(folder, now, INTERRUPTED, "it was asked to stop before it began", write=first)
        if reason is not None:
            return _end(folder, now, OVER_BUDGET, reason, write=first)
        if first:
            write_status(folder, now)
        run = read_run(folder)
        try:
            if trained(folder) is None:
                now, ended = _train(folder, run, resources, limits, stop, nodes, log, now)
                if ended is not None:
                    return ended
            if not first:
                return now
            if run.evaluate is not None:
                scores = _evaluate(folder, run, resources, stop)
                if scores is None:
                    return _end(folder, now, INTERRUPTED, "it was asked to stop before it was evaluated")
                now = replace(now, evaluation=scores)
        except (DataError, OSError) as error:
            return _end(folder, now, FAILED, str(error), write=first)
        return _end(folder, now, FINISHED, "")


def _end(folder: Path, status: Status, state: str, reason: str, *, write: bool = True) -> Status:
    status = replace(status, state=state, reason=reason, seconds=status.spent, since=None, group=0)
    return write_status(folder, status) if write else status


def training_command(folder: Path, run: Run, resources: Resources, nodes: Nodes, port: int) -> list[str]:
    """``deepspeed … script …``, as a list of arguments that no shell reads."""
    options = ["--master_port", str(port)]
    ranks = max(1, resources.gpus)
    if len(nodes.hosts) > 1:
        # Each node's own task starts its ranks: nothing needs ssh, and Slurm's signals reach all of them.
        hostfile = folder / f"hostfile.{nodes.rank}"
        hostfile.write_text("".join(f"{host} slots={ranks}\n" for host in nodes.hosts), encoding="utf-8")
        options += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(nodes.rank)]
        options += ["--master_addr", nodes.hosts[0]]
    else:
        options += ["--hostfile", os.devnull, "--num_accelerators", str(ranks)]
    script = [run.script] if Path(run.script).name == "finetune.py" else ["--module", "meft_engine.run", run.script]
    arguments = [*command_options(run, str(folder)), f"--deepspeed={folder / CONFIG}"]
    checkpoint = newest_whole(folder)
    if checkpoint is not None:
        arguments.append(f"--resume_from_checkpoint={checkpoint}")
    if resources.gpus == 0:
        arguments.append("--use_cpu=True")
    return launcher.deepspeed_command(*options, *script, *arguments)


def _train(
    folder: Path, run: Run, resources: Resources, limits: Limits, stop: Stop, nodes: Nodes, log: IO[str], now: Status
) -> tuple[Status, Status | None]:
    """Train, and say how that ended if it was not well."""
    first = nodes.rank == 0
    port = launcher.free_port() if len(nodes.hosts) == 1 else 20000 + zlib.crc32(nodes.job.encode()) % _PORTS
    command = training_command(folder, run, resources, nodes, port)
    print(f"\n--- attempt {now.attempts}: {command}", file=log, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-ISc", _DEAF_TO_USER_SIGNALS, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=launcher.environment(cpu=resources.gpus == 0),
        start_new_session=True,  # a Ctrl-C is for us alone, and what we send reaches all of them
    )
    if first:
        now = write_status(folder, replace(now, group=process.pid))
    log.close()  # from now on only the training holds the lock
    reason: list[str] = []

    def over_budget() -> bool:
        found = limits.exceeded(folder) if first else None
        reason[:] = [found] if found else []
        return bool(found)

    def forsaken() -> bool:
        """The first node, which other nodes wait for, has ended without them."""
        theirs = read_status(folder)
        return not first and theirs.job == nodes.job and theirs.state in (FAILED, OVER_BUDGET)

    code = _wait(process, stop, over_budget, forsaken)
    with _open_log(folder, nodes) as mine:
        _let_end(mine, process.pid)
    launcher.remove_buffers(port)
    if trained(folder) is not None and (code == 0 or stop.received):
        return now, None
    if stop.received:
        return now, _end(folder, now, INTERRUPTED, "it was asked to stop", write=first)
    if reason:
        return now, _end(folder, now, OVER_BUDGET, reason[0], write=first)
    return now, _end(folder, now, FAILED, f"the training ended with exit code {code}", write=first)


def _wait(process: subprocess.Popen, stop: Stop, over_budget: Callable[[], bool], forsaken: Callable[[], bool]) -> int:
    """The exit code of a training; when it has to stop, its ranks are told, again and again since one may be deaf yet.

    A second Ctrl-C ends it at once, and so does being forsaken.
    """
    asked, looked = 0.0, time.monotonic()
    stopping = False
    while process.poll() is None:
        now = time.monotonic()
        if not stopping and now - looked > _LOOK:
            stopping, looked = over_budget(), now
            if forsaken():
                _signal_group(process.pid, signal.SIGKILL)
        if (stopping or stop.received) and now - asked > _ASK_AGAIN:
            _signal_group(process.pid, signal.SIGUSR1)
            asked = now
        if stop.received.count(signal.SIGINT) > 1:
            _signal_group(process.pid, signal.SIGKILL)
        time.sleep(_POLL)
    return process.returncode


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _evaluate(folder: Path, run: Run, resources: Resources, stop: Stop) -> dict[str, Any] | None:
    """What ``evaluate.py`` says of the trained adapter, or ``None`` if we were asked to stop."""
    output = folder / EVALUATION_LOG
    with output.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            launcher.script("evaluate.py", *evaluation_options(run, str(folder))),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=launcher.environment(cpu=resources.gpus == 0),
            start_new_session=True,
        )
        while process.poll() is None:
            if stop.received:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
                return None
            time.sleep(_POLL)
    if process.returncode:
        raise DataError(f"evaluate.py ended with exit code {process.returncode}; its reason stands in {output}")
    for line in reversed(output.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    raise DataError(f"evaluate.py printed no result; see {output}")


# Who works in a folder


@contextlib.contextmanager
def _open_log(folder: Path, nodes: Nodes) -> Iterator[IO[str]]:
    name = LOG if nodes.rank == 0 else f"log.node{nodes.rank}.txt"
    with (folder / name).open("a", encoding="utf-8") as log:
        yield log


def _locked(log: IO[str]) -> bool:
    """Take the lock of a log; ``False``: somebody's training has it. A file system without locks has none."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def _wait_for_leftovers(log: IO[str], former: Status, stop: Stop) -> bool:
    """A training outlives a sweep that is killed; it goes on by itself, and we wait for it, if there is one."""
    asked, waited = 0.0, False
    while not _locked(log):
        waited = True
        if stop.received and former.host == socket.gethostname() and former.group and time.monotonic() - asked > 2:
            _signal_group(former.group, signal.SIGUSR1)
            asked = time.monotonic()
        time.sleep(_POLL)
    return waited


def _let_end(log: IO[str], group: int) -> None:
    """Until the last process of a training is gone: SIGTERM ends the launcher before its ranks have saved."""
    until, killed = time.monotonic() + _LAST_PROCESSES, False
    while not _locked(log):
        if time.monotonic() > until:
            if killed:
                return
            _signal_group(group, signal.SIGKILL)
            until, killed = time.monotonic() + 10, True
        time.sleep(_POLL)


def last_lines(folder: Path, count: int = 8) -> Sequence[str]:
    """The end of what a run printed: of its evaluation if that is what failed."""
    evaluated = trained(folder) is not None and (folder / EVALUATION_LOG).is_file()
    path = folder / (EVALUATION_LOG if evaluated else LOG)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]
