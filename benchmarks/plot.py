"""The figures as one picture: time of a step against the share of touched rows, and what a forward hides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402
from measure import Timing  # noqa: E402
from steps import Contest  # noqa: E402

# Okabe and Ito's palette, which the colour-blind can tell apart.
_OURS, _HALF, _SPARSE, _DENSE, _FLOOR, _FORWARD = "#0072B2", "#CC79A7", "#E69F00", "#D55E00", "#999999", "#009E73"


def draw(
    path: Path,
    contest: Contest,
    sparse: Mapping[float, Timing],
    overlap: Mapping[str, Timing],
    hidden: float,
    size: str,
    footnote: str,
) -> None:
    """Write the picture.

    Args:
        path: of the PNG. contest: ours and DeepSpeedCPUAdam. sparse: SparseAdam, by the percentage of touched rows.
        overlap, hidden: as overlap.py measures them, and the hidden share with a forward that sleeps.
        size: of the table, for people. footnote: what the machine is.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), width_ratios=[2.3, 1], layout="constrained")
    _shares(left, contest, sparse)
    left.set_title(f"One optimizer step of a table of {size}", loc="left", fontweight="bold")
    _overlap(right, overlap)
    right.set_title(f"Update hidden: {100 * hidden:.0f} %", loc="left", fontweight="bold")
    figure.supxlabel(f"{footnote}. Medians; bands are quartiles.", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shares(axes: Axes, contest: Contest, sparse: Mapping[float, Timing]) -> None:
    ours, dense = contest.ours, contest.dense
    shares = sorted(ours)
    for found, color, marker in ((sparse, _SPARSE, "s"), (contest.half, _HALF, "^"), (ours, _OURS, "o")):
        x = sorted(found)
        axes.plot(x, [found[share].median * 1e3 for share in x], marker=marker, color=color, linewidth=2, markersize=5)
        band = ([found[share].quantile(q) * 1e3 for share in x] for q in (0.25, 0.75))
        axes.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
    top = dense.median * 1e3
    axes.plot([shares[0], shares[-1]], [top, top], color=_DENSE, linewidth=2)
    floor = [top * share / 100 for share in shares]
    axes.plot(shares, floor, color=_FLOOR, linewidth=1.5, linestyle="--")
    for share in (1, 10, 100):
        axes.annotate(
            f"×{dense.median / ours[share].median:.2g}",
            (share, ours[share].median * 1e3),
            xytext=(8, -13),
            textcoords="offset points",
            color=_OURS,
            fontweight="bold",
        )
    label = {"textcoords": "offset points", "fontweight": "bold"}
    axes.annotate("DeepSpeedCPUAdam, all rows", (shares[0], top), xytext=(0, 5), color=_DENSE, **label)
    middle = min(sparse, key=lambda share: abs(share - 3))
    axes.annotate(
        "torch SparseAdam",
        (middle, sparse[middle].median * 1e3),
        xytext=(-8, 6),
        color=_SPARSE,
        ha="right",
        **label,
    )
    axes.annotate("ours", (shares[0], ours[shares[0]].median * 1e3), xytext=(2, 9), color=_OURS, **label)
    last = contest.half[shares[-1]].median * 1e3
    axes.annotate("bf16\nmoments", (shares[-1], last), xytext=(8, -30), color=_HALF, **label)
    axes.annotate(
        "floor: the touched bytes\nat DeepSpeedCPUAdam's bandwidth",
        (shares[1], floor[1]),
        xytext=(12, -14),
        textcoords="offset points",
        color="#777777",
        va="top",
    )
    axes.set(xscale="log", yscale="log", xlabel="touched rows, % of the table", ylabel="time of a step, ms")
    axes.xaxis.set_major_locator(FixedLocator(shares))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(shares[0] * 0.85, shares[-1] * 1.9)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)


def _overlap(axes: Axes, overlap: Mapping[str, Timing]) -> None:
    bars = (
        ("update\nalone", overlap["update"], _OURS),
        ("forward\nalone", overlap["sleep/forward"], _FORWARD),
        ("both,\noverlapped", overlap["sleep/both"], "#56B4E9"),
    )
    values = [timing.median * 1e3 for _, timing, _ in bars]
    drawn = axes.bar([name for name, _, _ in bars], values, color=[color for *_, color in bars], width=0.65)
    axes.bar_label(drawn, [f"{value:.0f} ms" for value in values], padding=3)
    axes.axhline(values[0] + values[1], color=_FLOOR, linestyle="--", linewidth=1.5)
    axes.annotate(
        "one after the other",
        (0, values[0] + values[1]),
        xytext=(-28, 4),
        textcoords="offset points",
        color="#777777",
    )
    axes.set_ylim(0, (values[0] + values[1]) * 1.12)
    axes.set_ylabel("ms")
    axes.set_xlabel(f"{overlap['update'].case.partition(',')[0]}, one thread updates,\nthe forward sleeps")
