"""The picture of ranks.py: what was measured, and the model's seconds and bytes against the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator  # noqa: E402

# Okabe and Ito's palette, which the colour-blind can tell apart.
_SHARES = ("#56B4E9", "#0072B2", "#CC79A7")
_DENSE, _LIMIT = "#D55E00", "#E69F00"
_MARKERS = "os^"


def draw(
    path: Path,
    measured: Mapping[float, Mapping[int, float]],
    dense: Mapping[int, float],
    model: Sequence[Mapping[str, Any]],
    titles: tuple[str, str],
    footnote: str,
) -> None:
    """Write the picture.

    Args:
        path: of the PNG. measured: seconds of the exchange by percentage of touched rows and ranks.
        dense: seconds of the all-reduce by ranks. model: lines of the model, of one precision, overlap and set of
            constants. titles: of what was measured, and of the model. footnote: what the machine is.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(2, 2, figsize=(12.5, 9.5), layout="constrained")
    (first, seconds), (sent, network) = panels
    _measured(first, measured, dense)
    first.set_title(f"Measured here: {titles[0]}", loc="left", fontweight="bold", fontsize=10)
    percents = sorted(measured)
    _model(seconds, percents, model, ("seconds", "dense_seconds"), 1.0, "seconds of a step")
    seconds.set_title(f"Modelled: {titles[1]}", loc="left", fontweight="bold", fontsize=10)
    _model(sent, percents, model, ("bytes", "dense_bytes"), 1e-9, "GB that a rank sends in a step")
    sent.set_title("Modelled: bytes of a rank", loc="left", fontweight="bold", fontsize=10)
    names = ("network_bytes_of_node", "dense_network_bytes_of_node")
    _model(network, percents, model, names, 1e-9, "GB out of a node in a step")
    network.set_title("Modelled: bytes through a node's network", loc="left", fontweight="bold", fontsize=10)
    handles, labels = seconds.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{footnote}. Rows are drawn at random, fp32 on the way.", fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _measured(axes: Axes, measured: Mapping[float, Mapping[int, float]], dense: Mapping[int, float]) -> None:
    for percent, color, marker in zip(sorted(measured), _SHARES, _MARKERS, strict=False):
        found = measured[percent]
        x = sorted(found)
        axes.plot(x, [found[ranks] * 1e3 for ranks in x], color=color, marker=marker, linewidth=2, markersize=5)
    x = sorted(dense)
    axes.plot(x, [dense[ranks] * 1e3 for ranks in x], color=_DENSE, marker="D", linewidth=2, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="ranks, one node", ylabel="ms of a step")
    _ticks(axes, sorted({ranks for found in measured.values() for ranks in found}))


def _model(
    axes: Axes,
    percents: Sequence[float],
    lines: Sequence[Mapping[str, Any]],
    columns: tuple[str, str],
    unit: float,
    label: str,
) -> None:
    """Draw the ``columns`` of the exchange and of the dense all-reduce."""
    found = sorted((line for line in lines if line["ranks"] > 1), key=lambda line: line["ranks"])
    for percent, color, marker in zip(percents, _SHARES, _MARKERS, strict=False):
        own = [line for line in found if line["touched_percent"] == percent and line[columns[0]]]
        x, y = [line["ranks"] for line in own], [line[columns[0]] * unit for line in own]
        name = f"touched rows, {percent:g} % by each rank"
        axes.plot(x, y, color=color, marker=marker, linewidth=2, markersize=5, label=name)
    dense = [line for line in found if line["touched_percent"] == percents[0]]

    def draw_dense(column: str, **style: Any) -> None:
        own = [line for line in dense if line[column]]
        axes.plot([line["ranks"] for line in own], [line[column] * unit for line in own], linewidth=2, **style)

    draw_dense(columns[1], color=_DENSE, marker="D", markersize=4, label="all rows, ring all-reduce")
    if columns[0] == "seconds":
        draw_dense("dense_network_seconds", color=_LIMIT, linestyle="--", label="all rows, network's bytes alone")
    axes.set(xscale="log", yscale="log", xlabel="ranks, 8 a node", ylabel=label)
    _ticks(axes, [2, 8, 32, 128, 1024])
    axes.set_xlim(1.7, 1250)


def _ticks(axes: Axes, ranks: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
