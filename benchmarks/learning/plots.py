"""The results as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: E402

from learning.plan import ROWS, Comparison, Entry  # noqa: E402
from learning.runner import Result  # noqa: E402
from learning.sparsity import CAPS  # noqa: E402

# Okabe and Ito's palette, which the colour-blind can tell apart.
_COLORS = {"meft": "#0072B2", "lora_16": "#E69F00", "lora_equal_bytes": "#D55E00", "dense": "#009E73"}
_COLORS["lora"] = _COLORS["lora_16"]
_NAMES = {"meft": "MEFT", "lora_16": "LoRA", "lora_equal_bytes": "LoRA", "dense": "dense adapter", "lora": "LoRA"}
_SMOOTHED = 5
"""Steps over which a loss curve is averaged."""


def draw_methods(path: Path, comparison: Comparison, sized: Sequence[Entry]) -> None:
    """Loss against step and seconds, exact match against size if sizes were tried, perplexity against exact match."""
    _style()
    shape = {"nrows": 2, "ncols": 2, "figsize": (12, 9)} if sized else {"ncols": 3, "figsize": (16, 4.8)}
    figure, axes = plt.subplots(**shape, layout="constrained")
    by_step, by_time, *others = axes.flat
    for index, (axis, title) in enumerate(((by_step, "step"), (by_time, "seconds on one core"))):
        for method in comparison.best:
            _losses(axis, comparison.results(method), method, seconds=bool(index))
        axis.set(xlabel=title, ylabel="training loss", yscale="log")
        axis.set_title(f"Loss against {title.split()[0]}", loc="left", fontweight="bold")
        axis.grid(True, color="#dddddd", linewidth=0.6)
    by_step.legend(frameon=False)
    if sized:
        _sizes(others[0], comparison, sized)
    _forgetting(others[-1], comparison)
    facts = comparison.best["meft"].facts
    figure.supxlabel(
        f"{facts} facts, SmolLM2-135M, adapters in its last ten layers; best learning rate of each method, bands: "
        "range over three seeds",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_sparsity(path: Path, entries: Sequence[Entry]) -> None:
    """Exact match against touched rows, kept mass against the cap, and touched rows while training goes on.

    Args:
        entries: with the learning rates that were chosen.
    """
    _style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    meft = [e for e in entries if e.result.trial.method == "meft"]
    _front(left, meft)
    first = [e for e in meft if e.result.trial.seed == 0]
    shown = [e for e in first if e.study == "methods" or (e.study == "sparsity" and "top_k" in e.label)]
    for entry in sorted(shown, key=_top_k):
        label = f"K = {_top_k(entry)}"
        kept = [entry.result["text_kept_by_cap"][str(cap)] for cap in CAPS]
        middle.plot([100 * cap for cap in CAPS], kept, marker="o", label=label)
        touched = [entry.result["start_text_touched"], *entry.result["touched_by_epoch"]]
        right.plot(range(1, len(touched)), [100 * share for share in touched[1:]], marker="o", label=label)
    middle.axhline(0.98, color="#999999", linestyle="--", linewidth=1)
    middle.set(xlabel="cap, % of the rows", ylabel="kept share of the activation")
    middle.set_title("512 tokens of text, after training", loc="left", fontweight="bold")
    right.set(xlabel="epoch", ylabel="rows touched by a micro-batch, %")
    right.set_title("While training", loc="left", fontweight="bold")
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (middle, right):
        axis.legend(frameon=False)
        axis.grid(True, color="#dddddd", linewidth=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def _losses(axis: Axes, results: Sequence[Result], method: str, seconds: bool) -> None:
    curves = [_smooth(result["losses"]) for result in results]
    pace = statistics.fmean(r["seconds"] / len(r["losses"]) for r in results) if seconds else 1.0
    x = [(step + _SMOOTHED) * pace for step in range(len(curves[0]))]
    columns = list(zip(*curves, strict=True))
    rank = f" rank {results[0].trial.rank}" if results[0].trial.rank else f", {ROWS} rows"
    color = _COLORS[method]
    axis.plot(x, [statistics.fmean(c) for c in columns], color=color, linewidth=2, label=_NAMES[method] + rank)
    axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, linewidth=0)


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[i : i + _SMOOTHED]) for i in range(max(1, len(values) - _SMOOTHED + 1))]


def _sizes(axis: Axes, comparison: Comparison, sized: Sequence[Entry]) -> None:
    curves: dict[str, dict[int, list[Result]]] = {"meft": {}, "dense": {}, "lora": {}}
    for entry in sorted(sized, key=lambda entry: entry.result["trained_loss"]):
        if entry.study == "sizes" and _size(entry.result) not in curves[entry.label]:
            curves[entry.label][_size(entry.result)] = [entry.result]
    for method in comparison.best:
        curve = curves["lora" if "lora" in method else method]
        curve.setdefault(_size(comparison.results(method)[0]), []).extend(comparison.results(method))
    for method, points in curves.items():
        x = sorted(points)
        for name, line, label in (
            ("trained_exact_match", "-", _NAMES[method]),
            ("second_wording_exact_match", "--", None),
        ):
            y = [statistics.fmean(result[name] for result in points[size]) for size in x]
            axis.plot(x, y, line, marker="o", color=_COLORS[method], linewidth=2, markersize=4, label=label)
    ticks = sorted({size for points in curves.values() for size in points})
    axis.set(xscale="log", xlabel="rows, or LoRA's rank", ylabel="exact match", ylim=(0, 1))
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(axis="x", labelsize=8, rotation=45)
    axis.set_title("Exact match against size (dashed: second wording)", loc="left", fontweight="bold")
    axis.legend(frameon=False)
    axis.grid(True, color="#dddddd", linewidth=0.6)


def _size(result: Result) -> int:
    trial = result.trial
    return trial.rank or trial.rows or trial.adapter.get("rows", ROWS)


def _forgetting(axis: Axes, comparison: Comparison) -> None:
    for method in comparison.best:
        points = [e.result for e in comparison.entries if e.label == method]
        x = [point["trained_exact_match"] for point in points]
        y = [point["perplexity_after"] for point in points]
        rank = f" rank {points[0].trial.rank}" if points[0].trial.rank else ""
        axis.scatter(x, y, color=_COLORS[method], label=_NAMES[method] + rank, s=36)
    before = comparison.entries[0].result["perplexity_before"]
    axis.axhline(before, color="#999999", linestyle="--", linewidth=1)
    axis.annotate("before training", (0, before), xytext=(4, 4), textcoords="offset points", color="#777777")
    axis.set(yscale="log", xlim=(0, 1), xlabel="exact match", ylabel="perplexity on a text")
    axis.set_title("What is forgotten (every rate and seed)", loc="left", fontweight="bold")
    axis.legend(frameon=False)
    axis.grid(True, color="#dddddd", linewidth=0.6)


def _front(axis: Axes, entries: Sequence[Entry]) -> None:
    """Exact match against touched rows; the line joins what nothing beats in both."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault("defaults" if entry.study == "methods" else entry.label, []).append(entry)
    points = {
        label: (
            100 * statistics.fmean(e.result["touched_by_epoch"][-1] for e in group),
            statistics.fmean(e.result["trained_exact_match"] for e in group),
        )
        for label, group in found.items()
    }
    axis.scatter(*zip(*points.values(), strict=True), color="#bbbbbb", s=24)
    best, front = -1.0, []
    for label, (touched, match) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if match > best:
            best = match
            front.append((touched, match))
            axis.annotate(label, (touched, match), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axis.plot(*zip(*front, strict=True), color=_COLORS["meft"], marker="o", linewidth=2)
    axis.set(xlabel="rows touched by a micro-batch, %", ylabel="exact match")
    axis.set_title("Pareto front of the settings", loc="left", fontweight="bold")
    axis.grid(True, color="#dddddd", linewidth=0.6)


def _top_k(entry: Entry) -> int:
    from meft_engine.config import MeftConfig

    return entry.result.trial.adapter.get("top_k", MeftConfig().adapter.top_k)
