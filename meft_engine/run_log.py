"""The log of a run: a file of JSON lines in the run's folder, to which records are appended.

Each has a ``kind`` and a ``time``, in seconds since 1970; :mod:`meft_engine.recorder` says what an engine writes.
Numbers that JSON does not have stand there as the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("meft_engine")

FILE = "meft_log.jsonl"


def append(folder: Path, kind: str, **values: Any) -> None:
    """Add a record to the log in ``folder``, both of which are made if they are not there.

    A line that was cut off, by whatever ended its writer, is ended first, so that no other is lost to it.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps(_in_json({"kind": kind, "time": round(time.time(), 3), **values}), allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a+b") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of the log in ``folder``, in their order; lines that are none, such as one cut off, are left out.

    Raises:
        OSError: if there is no log, or it cannot be read.
    """
    records = []
    for line in (folder / FILE).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
    return records


def number(value: Any) -> float:
    """A number of a record, whatever it is; NaN where there is none."""
    return float(value) if value is not None else math.nan


def _in_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _in_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    return value


class RunLog:
    """The log's place, and the end that it gets when Python exits; holds nothing of the engine."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.step = 0
        self._open = False

    def append(self, kind: str, step: int, **values: Any) -> None:
        """A disk that is full must not end the training: what cannot be written is said once, and no more is tried."""
        if self.folder is None:
            return
        try:
            append(self.folder, kind, step=step, **values)
        except OSError as error:
            logger.warning(
                "the run's log cannot be written to %s (%s), so the run goes on without one; set monitor.folder",
                self.folder / FILE,
                error.strerror or error,
            )
            self.folder = None
            return
        self.step = step
        if kind in ("start", "step") and not self._open:
            self._open = True
            atexit.register(self.end)

    def end(self) -> None:
        """Training is over, if it has begun."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.end)
        error = getattr(sys, "last_type", None)  # what ended the script, if it was an error
        self.append("end", self.step, error=error.__name__ if error is not None else None)
