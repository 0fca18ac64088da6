"""Write one page about a run or several, from the logs in their folders.

The page is one file that needs no other; beside it, the pictures as PNG.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from meft_engine.checkpoint.folders import write_text
from meft_engine.config import MeftConfigError
from meft_engine.run_report.reader import Run, names_of, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``meft-engine report`` takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, with meft_log.jsonl in it")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="report.html if not given"
    )
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="write it again so often, until no run is going on any more"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        MeftConfigError: if matplotlib is missing, a folder has no log, or the page cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MeftConfigError("a report needs matplotlib, which is not installed; pip install 'meft-engine[report]'")
    if arguments.watch is not None and not arguments.watch > 0:
        raise MeftConfigError(f"--watch = {arguments.watch:g} must be more than 0 seconds")
    folders, output = list(arguments.runs), arguments.output
    if arguments.watch is not None:
        with suppress(KeyboardInterrupt):
            _follow(folders, output, arguments.watch)
    runs = _read(folders)
    _write(runs, output, pictures=True)
    print(f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {_pictures_of(output)}: the pictures")
    return 0


def _read(folders: Sequence[Path]) -> list[Run]:
    return [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def _follow(folders: Sequence[Path], output: Path, seconds: float) -> None:
    """Write the page anew until all runs have ended; a run that has not begun is waited for."""
    waiting = False
    while True:
        try:
            runs = _read(folders)
        except MeftConfigError as error:
            if not waiting:
                print(f"waiting: {error}", flush=True)
            waiting = True
        else:
            now = time.time()
            if all(run.state(now) not in ("going on", "not begun") for run in runs):
                return
            _write(runs, output, refresh=seconds)
            print(f"{output}: step {', '.join(f'{run.last_step:,}' for run in runs)}", flush=True)
        time.sleep(seconds)


def _write(runs: Sequence[Run], output: Path, *, refresh: float | None = None, pictures: bool = False) -> None:
    from meft_engine.run_report.page import page, sections, thin  # matplotlib takes a second

    every = [thin(run) for run in runs]
    drawn = sections(runs)
    text = page(runs, drawn, every=every, refresh=refresh, now=time.time())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)  # whole, as it was or as it is now, whenever a browser reads it
        if pictures:
            folder = _pictures_of(output)
            folder.mkdir(exist_ok=True)
            for chart in (chart for _, charts in drawn for chart in charts):
                chart.png(folder / f"{chart.key}.png")
    except OSError as error:
        raise MeftConfigError(f"--output = {output} cannot be written ({error.strerror}); name another file") from None


def _pictures_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}-pictures")
