"""What came of a sweep: a table, ``results.csv`` and one plot of all runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from sweep_plan import read_run
from sweep_run import read_status, trained

from meft_engine.checkpoint.folders import write_text

RESULTS, PLOT = "results.csv", "results"


@dataclass(frozen=True)
class Result:
    """One row."""

    run: str
    state: str
    settings: dict[str, Any]
    figures: dict[str, float | None]
    """``None`` where a run has not come that far, or has no such figure."""
    attempts: int
    seconds: float


def collect(folders: Sequence[Path]) -> list[Result]:
    """The results of runs, from their folders."""
    return [_result(folder) for folder in folders]


def _result(folder: Path) -> Result:
    status, report = read_status(folder), trained(folder) or {}
    figures = {"final_loss": _final_loss(folder) if report else None}
    figures |= _exact_matches(status.evaluation)
    figures |= {key: report.get(key) for key in ("seconds_per_step", "touched_share", "host_bytes")}
    return Result(folder.name, status.state, read_run(folder).settings, figures, status.attempts, status.spent)


def _exact_matches(evaluation: dict[str, Any]) -> dict[str, float | None]:
    scored = {key: value for key, value in evaluation.items() if isinstance(value, dict) and "exact_match" in value}
    if len(scored) == 1:
        return {"exact_match": next(iter(scored.values()))["exact_match"]}
    return {f"exact_match {stem}": value["exact_match"] for stem, value in scored.items()} or {"exact_match": None}


def _final_loss(folder: Path) -> float | None:
    """The last one that was logged. (``train_loss`` of the report is the mean of one attempt alone.)"""
    try:
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError):
        return None
    return next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)


def columns(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Keys in which runs differ, and names of figures, each in order of their first appearance."""
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    figures = list(dict.fromkeys(name for result in results for name in result.figures))
    if any(name.startswith("exact_match ") for name in figures):
        figures = [name for name in figures if name != "exact_match"]
    return keys, sorted(figures, key=_order)


def _order(name: str) -> int:
    names = ["final_loss", "exact_match", "seconds_per_step", "touched_share", "host_bytes"]
    return names.index(name.partition(" ")[0])


def show(results: Sequence[Result]) -> Table:
    """The table for people."""
    keys, names = columns(results)
    table = Table(title=f"{len(results)} runs", title_justify="left")
    table.add_column("run")
    table.add_column("state")
    for name in (*keys, *names):
        table.add_column(name.rpartition(".")[2].replace("_", " "), justify="right")
    for result in results:
        cells = [_cell(result.settings.get(key)) for key in keys]
        cells += [_figure(name, result.figures.get(name)) for name in names]
        table.add_row(result.run.partition("-")[0], result.state, *cells)
    return table


def _cell(value: Any) -> str:
    from rich.markup import escape

    return "" if value is None else f"{value:g}" if isinstance(value, float) else escape(str(value))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "host_bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.1%}" if name == "touched_share" else f"{value:.3f}"


def write_csv(results: Sequence[Result], output: Path) -> Path:
    """``results.csv``, whole or not at all."""
    keys, names = columns(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", *keys, *names, "attempts", "seconds"])
    for result in results:
        values = [result.settings.get(key) for key in keys] + [result.figures.get(name) for name in names]
        plain = ["" if v is None else json.dumps(v) if isinstance(v, list | dict | bool) else v for v in values]
        writer.writerow([result.run, result.state, *plain, result.attempts, f"{result.seconds:.1f}"])
    write_text(output / RESULTS, text.getvalue())
    return output / RESULTS


def plot(results: Sequence[Result], output: Path) -> list[Path]:
    """``results.png`` and ``results.svg``: a panel for each figure, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, names = columns(results)
    shown = [name for name in names if any(result.figures.get(name) is not None for result in results)]
    if not shown:
        return []
    height = 1.2 + 0.28 * len(results)
    figure, axes = pyplot.subplots(1, len(shown), sharey=True, squeeze=False, figsize=(2.6 + 2.2 * len(shown), height))
    places = range(len(results))
    for axis, name in zip(axes[0], shown, strict=True):
        scale = 2**20 if name == "host_bytes" else 1
        points = [(result.figures.get(name), place) for result, place in zip(results, places, strict=True)]
        known = [(value / scale, place) for value, place in points if value is not None]
        axis.scatter(*zip(*known, strict=True), s=22, color="#20639b", zorder=3)
        axis.set_title("host MiB" if name == "host_bytes" else name.replace("_", " "), fontsize=9)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
    axes[0][0].set_yticks(places, [_label(result) for result in results])
    axes[0][0].set_ylim(len(results) - 0.5, -0.5)
    figure.tight_layout()
    paths = [output / f"{PLOT}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def _label(result: Result) -> str:
    # A dollar sign would begin a formula.
    name = result.run.replace("$", r"\$")
    return name if result.state == "finished" else f"{name} ({result.state})"
