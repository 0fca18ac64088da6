"""Trains with many settings, one run for each, and ends in one table of what came of them.

    python launch/sweep.py launch/sweeps/demo.yaml --output runs/sweep [--dry_run] [--slurm]

docs/sweeps.md explains the YAML. The same command goes on with what is not finished. The exit code is 0 when all runs
are finished, 1 when some are not, 2 when the sweep cannot start.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import sweep_file
from data import DataError
from rich.console import Console
from rich.markup import escape
from sweep_file import SweepFile
from sweep_plan import Run, check, expand, make_folder, match
from sweep_run import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    Limits,
    Status,
    Stop,
    execute,
    last_lines,
    read_status,
    write_status,
)

from meft_engine import run_log

CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
LOCK = ".lock"
_LOOK = 2.0
"""Seconds between two looks at jobs."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to run")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="folder, with one for each run in it")
    parser.add_argument("--slurm", action="store_true", help="submit a job array in place of running here")
    parser.add_argument("--dry_run", action="store_true", help="check everything, list the runs, start nothing")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> tuple[SweepFile, list[Run], list[Path]]:
    """The file, its runs and their folders, all of them checked.

    Raises:
        DataError: one sentence, for what cannot work.
    """
    file = sweep_file.read(args.sweep)
    if file.resources.nodes > 1 and not args.slurm:
        raise DataError(f"resources.nodes = {file.resources.nodes} needs --slurm; without it, leave nodes out")
    runs = expand(file)
    check(runs)
    return file, runs, match(runs, args.output.resolve())


def show_plan(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Which runs there are, and how they stand."""
    for run, folder in zip(runs, folders, strict=True):
        settings = ", ".join(f"{key} = {value!r}" for key, value in run.settings.items())
        CONSOLE.print(f"{folder.name}  [dim]{read_status(folder).state}[/]  {escape(settings)}", highlight=False)


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder.

    Raises:
        DataError: if one is in there.
    """
    import filelock

    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise DataError(f"another sweep is at work in {output}; wait for it, or take another --output") from None
    try:
        yield
    finally:
        lock.release()


def limits_of(file: SweepFile) -> Limits:
    """The budget in seconds."""
    run, total = file.budget.hours_per_run, file.budget.hours_total
    return Limits(None if run is None else run * 3600, None if total is None else total * 3600)


def tell(folder: Path, status: Status) -> None:
    """One line about a run."""
    color = {FINISHED: "green", FAILED: "red"}.get(status.state, "yellow")
    reason = f": {status.reason}" if status.reason else ""
    CONSOLE.print(
        f"{folder.name}  [{color}]{status.state}[/]{escape(reason)}  [dim]{status.spent:.0f} s[/]", highlight=False
    )


def run_here(file: SweepFile, folders: Sequence[Path], stop: Stop) -> None:
    """One after the other; one that fails does not keep the others from running."""
    for folder in folders:
        if stop.received:
            return
        if read_status(folder).state == FINISHED:
            continue
        CONSOLE.print(f"{folder.name}  [dim]runs; its output goes to {escape(str(folder / 'log.txt'))}[/]")
        tell(folder, execute(folder, file.resources, limits_of(file), stop))


def run_on_slurm(file: SweepFile, folders: Sequence[Path], output: Path, name: str, stop: Stop) -> None:
    """Submit what is neither finished nor queued, and wait; jobs go on without us if we are stopped."""
    import sweep_slurm

    living = sweep_slurm.alive()
    if living is None:
        raise DataError("squeue does not answer; --slurm has to be used where Slurm's commands are")
    statuses = {folder: read_status(folder) for folder in folders}
    missing = [folder for folder, now in statuses.items() if now.state != FINISHED and now.job not in living]
    if missing:
        jobs = sweep_slurm.submit(missing, output, file.resources, limits_of(file), name)
        CONSOLE.print(f"submitted {len(jobs)} runs as {jobs[0].job.partition('_')[0]}")
    waiting = [folder for folder, now in statuses.items() if now.state != FINISHED]
    while waiting and not stop.received:
        living = sweep_slurm.alive()
        for folder in list(waiting):
            now = read_status(folder)
            if living is not None and now.job not in living:
                now = _ended(folder)
                tell(folder, now)
                waiting.remove(folder)
        for _ in range(round(_LOOK / 0.2)):
            if waiting and not stop.received:
                time.sleep(0.2)
    if waiting:
        CONSOLE.print(f"{len(waiting)} runs go on without this process; the same command comes back to them")


def _ended(folder: Path) -> Status:
    """The status of a run whose job is gone; one that could not say how it ended was cut off."""
    now = read_status(folder)
    if now.state in (RUNNING, "waiting"):
        reason = f"job {now.job} ended without a word (cancelled, out of memory, or its node was lost)"
        now = write_status(folder, replace(now, state=INTERRUPTED, reason=reason, since=None))
    return now


def finish(folders: Sequence[Path], output: Path) -> int:
    """Table, CSV and plot of all runs; those that are not finished are named, with the end of what they printed."""
    import sweep_table

    results = sweep_table.collect(folders)
    CONSOLE.print(sweep_table.show(results))
    paths = [sweep_table.write_csv(results, output), *sweep_table.plot(results, output)]
    CONSOLE.print(f"in {escape(str(output))}: {', '.join(path.name for path in paths)}", highlight=False)
    if any((folder / run_log.FILE).is_file() for folder in folders):
        place = shlex.quote(str(output))
        CONSOLE.print(
            f"side by side: meft-engine report {place}/[0-9]*/ --output {place}/report.html",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    unfinished = [folder for folder in folders if read_status(folder).state != FINISHED]
    for folder in unfinished:
        now = read_status(folder)
        CONSOLE.rule(f"{folder.name}: {now.state}", style="red" if now.state == FAILED else "yellow", align="left")
        CONSOLE.print(now.reason or "it has not run to its end", markup=False, highlight=False)
        if now.state == FAILED:
            for line in last_lines(folder):
                CONSOLE.print(f"    {line}", markup=False, highlight=False)
    if unfinished:
        CONSOLE.print(f"{len(unfinished)} of {len(folders)} runs are not finished; the same command goes on with them")
    return 1 if unfinished else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line, see the top of this file.

    Returns:
        The exit code.
    """
    args = parse_arguments(argv)
    output = args.output.resolve()
    stop = Stop()
    try:
        if args.dry_run:
            _, runs, folders = plan(args)
            show_plan(runs, folders)
            CONSOLE.print(f"{len(runs)} runs; nothing was started")
            return 0
        with alone_in(output):
            file, runs, folders = plan(args)
            for run, folder in zip(runs, folders, strict=True):
                if not folder.exists():
                    make_folder(run, folder)
            stop.listen(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            if args.slurm:
                run_on_slurm(file, folders, output, f"sweep-{args.sweep.stem}", stop)
            else:
                run_here(file, folders, stop)
            return finish(folders, output)
    except DataError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
