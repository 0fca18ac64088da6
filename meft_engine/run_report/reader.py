"""What the files of a run's folder say of it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_engine import run_log
from meft_engine.config import MeftConfigError

REPORT = "train_report.json"
"""What ``launch/finetune.py`` writes at the end."""

SILENCE = 600.0
"""Seconds without a record after which a run no longer counts as going on, unless its readings come as seldom."""

Record = dict[str, Any]


@dataclass
class Run:
    """A run as its log tells it; of steps that were taken again after a resume, the later ones."""

    folder: Path
    name: str
    start: Record = field(default_factory=dict)
    """The last one; empty before the first step."""
    steps: list[Record] = field(default_factory=list)
    layers: list[Record] = field(default_factory=list)
    memory: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    end: Record | None = None
    report: Record = field(default_factory=dict)
    """``train_report.json``, where there is one."""
    resumes: int = 0
    tokens: int = 0
    """That rank 0 has routed in these steps, whatever processes took them."""
    seconds: float = 0.0
    """Of these steps."""
    last_news: float = 0.0

    def figure(self, name: str) -> tuple[list[int], list[float]]:
        """Steps, and a figure of the readings there; those without it are left out."""
        found = [(r["step"], run_log.number(r["figures"][name])) for r in self.steps if name in r["figures"]]
        return [step for step, _ in found], [value for _, value in found]

    def figures(self) -> list[str]:
        """Names of all figures, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.steps for name in record["figures"]))

    def last(self, name: str) -> float | None:
        """A figure at its last reading."""
        return next((run_log.number(r["figures"][name]) for r in reversed(self.steps) if name in r["figures"]), None)

    @property
    def last_step(self) -> int:
        """The step of the last reading."""
        return self.steps[-1]["step"] if self.steps else self.start.get("step", 0)

    def scores(self) -> dict[str, dict[int, Record]]:
        """What evaluations found: by set of questions, by step."""
        found: dict[str, dict[int, Record]] = {}
        for record in self.evaluations:
            for name, result in record["results"].items():
                found.setdefault(name, {})[record["step"]] = result
        return {name: dict(sorted(of_steps.items())) for name, of_steps in found.items()}

    def state(self, now: float | None = None) -> str:
        """``"not begun"``, ``"going on"``, ``"finished"``, ``"failed"``, or ``"silent"``: it has not ended, and writes
        nothing."""
        if not self.start:
            return "not begun"
        if self.end is not None:
            return "failed" if self.end.get("error") else "finished"
        times = [record["time"] for record in self.steps]
        pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        patience = max(SILENCE, 20 * statistics.median(pauses)) if pauses else SILENCE
        return "going on" if (now or time.time()) - self.last_news < patience else "silent"


def read_run(folder: Path, name: str) -> Run:
    """What there is of a run by now.

    Raises:
        MeftConfigError: in one sentence, if the folder has no log.
    """
    try:
        records = run_log.read(folder)
    except OSError as error:
        raise MeftConfigError(
            f"RUN = {folder} has no log ({run_log.FILE}: {error.strerror}); name the output_dir of a Trainer, or what "
            "monitor.folder of the block says, of a run that has begun to train"
        ) from None
    run = Run(folder, name)
    base, totals = (0, 0.0), [(0, 0, 0.0)]  # at the last start; at each step, with its number
    keeps = {
        "step": run.steps,
        "layers": run.layers,
        "memory": run.memory,
        "validation": run.validations,
        "evaluation": run.evaluations,
    }
    for record in records:
        kind = record["kind"]
        run.last_news = max(run.last_news, record["time"])
        if kind == "start":
            for kept in keeps.values():  # steps beyond it have been given up
                kept[:] = [earlier for earlier in kept if earlier["step"] <= record["step"]]
            totals = [total for total in totals if total[0] <= record["step"]]
            base = totals[-1][1:]
            run.resumes = run.resumes + bool(run.start) if record["step"] else 0
            run.start, run.end = record, None
        elif kind == "end":
            run.end = record
        elif kind in keeps:
            keeps[kind].append(record)
        if kind == "step":
            totals.append((record["step"], base[0] + record["tokens"], base[1] + record["seconds"]))
            run.end = None
    _, run.tokens, run.seconds = totals[-1]
    run.report = _report(folder)
    return run


def _report(folder: Path) -> Record:
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def names_of(folders: Sequence[Path]) -> list[str]:
    """What the page calls the runs: their paths, without what all have in common."""
    absolute = [folder.absolute() for folder in folders]
    if len(folders) == 1:
        given = str(folders[0])
        return [given if not folders[0].is_absolute() else "/".join(absolute[0].parts[-2:])]
    shared = Path(os.path.commonpath([folder.parent for folder in absolute]))
    names = [folder.relative_to(shared).as_posix() for folder in absolute]
    ends = [Path(name).parts[-1] for name in names]
    if len(set(ends)) == 1 and all(len(Path(name).parts) > 1 for name in names):  # …/adapter of all of them
        names = [Path(name).parent.as_posix() for name in names]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


# --- settings


def flatten(settings: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_SETTINGS = (
    *("model", "block", "layers", "compute_dtype", "ranks", "nodes", "zero_stage"),
    *("batch", "optimizer", "device", "versions"),
)


def settings_of(run: Run) -> Record:
    """What a run was started with, by name; fields of the block have no prefix."""
    chosen = {name: run.start[name] for name in _SETTINGS if name in run.start}
    found = dict(flatten(chosen))
    found["layers"] = len(run.start.get("layers", ()))
    return {name.removeprefix("block."): value for name, value in found.items()}


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs that have begun, but for those that only name a place."""
    found = [settings_of(run) for run in runs if run.start]
    names = dict.fromkeys(name for settings in found for name in settings)
    without = {"monitor.folder", "batch.most_tokens_of_a_micro_batch"}
    return [name for name in names if name not in without and any(s.get(name) != found[0].get(name) for s in found)]
