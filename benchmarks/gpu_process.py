"""Parts of the benchmark on a GPU, each in a process of its own: what fails, or fills the card, ends with it."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil


def run(command: Sequence[str], *, timeout: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a program, and print what it prints as it comes, but for its last line, which is a JSON object.

    Args:
        timeout: seconds, after which it is ended with all that it has started.

    Returns:
        the object; ``{"error": reason}`` where the program has failed or was not done in time.
    """
    last, late = "", threading.Event()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=dict(environment)) as process,
    ):
        alarm = threading.Timer(timeout, _end, [process.pid, late])
        alarm.start()
        try:
            for line in process.stdout:
                if last:
                    print(last, flush=True)
                last = line.rstrip("\n")
            process.wait()
        finally:
            alarm.cancel()
            process.kill()
        said.seek(0)
        complaints = [line.strip() for line in said if line.strip()]
    found = parsed(last)
    if found is not None and process.returncode == 0:
        return found
    if last:
        print(last, flush=True)
    if late.is_set():
        return {"error": f"not done after {timeout:.0f} s"}
    return {"error": complaints[-1] if complaints else f"ended with {process.returncode} and without figures"}


def _end(pid: int, late: threading.Event) -> None:
    late.set()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def parsed(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; ``None`` if it is none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
