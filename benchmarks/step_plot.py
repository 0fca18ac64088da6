"""The figures of step.py as pictures: who takes how long, what grows with the rows, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

# Okabe and Ito's palette, which the colour-blind can tell apart.
_BASE, _OURS, _DENSE, _LORA, _FLOOR = "#999999", "#0072B2", "#D55E00", "#009E73", "#56B4E9"
_LINES = ("#0072B2", "#E69F00", "#CC79A7", "#009E73")


def draw(
    path: Path,
    bars: Sequence[tuple[str, str, float]],
    growth: Mapping[str, Sequence[tuple[float, float]]],
    memory: Mapping[str, Sequence[tuple[float, float]]],
    profile: Sequence[tuple[str, float, float]],
    footnote: str,
) -> None:
    """Write the picture.

    Args:
        bars: name, method and milliseconds of a step. growth: milliseconds by rows, for each line of the plan.
        memory: MiB by rows, for each kind. profile: part, milliseconds and its floor. footnote: what the machine is.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    _bars(axes[0, 0], bars)
    _growth(axes[0, 1], growth, "ms a step", "A step against the number of rows")
    _growth(axes[1, 0], memory, "MiB", "Memory of the adapter, all layers")
    _profile(axes[1, 1], profile)
    figure.supxlabel(footnote, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Axes, bars: Sequence[tuple[str, str, float]]) -> None:
    colors = {"base": _BASE, "meft": _OURS, "dense": _DENSE, "lora": _LORA}
    bars = bars[::-1]
    drawn = axes.barh([name for name, _, _ in bars], [ms for _, _, ms in bars], color=[colors[m] for _, m, _ in bars])
    axes.bar_label(drawn, [f" {ms:,.0f} ms" for _, _, ms in bars], fontsize=9)
    axes.margins(x=0.15)
    axes.set_xlabel("ms a step, optimizer included (base: forward and backward)")
    axes.set_title("A training step, all 30 layers", loc="left", fontweight="bold")


def _growth(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], unit: str, title: str) -> None:
    for color, (name, points) in zip(_LINES, lines.items(), strict=False):
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda rows, _: f"{rows / 1024:,.0f} K")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a layer")
    axes.set_ylabel(unit)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, loc="left", fontweight="bold")


def _profile(axes: Axes, profile: Sequence[tuple[str, float, float]]) -> None:
    names = [name for name, _, _ in profile][::-1]
    axes.barh(names, [ms for _, ms, _ in profile][::-1], color=_OURS, label="measured")
    axes.barh(names, [floor for _, _, floor in profile][::-1], color=_FLOOR, height=0.4, label="floor")
    axes.set_xlabel("ms a step")
    axes.legend(frameon=False, fontsize=8)
    axes.margins(x=0.3)
    axes.set_title("Where the adapter's time goes, r = 8192", loc="left", fontweight="bold")
