"""The pictures of a report that look into the layers: which experts tokens choose, and which rows are ever updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from meft_engine import run_log
from meft_engine.run_report import words
from meft_engine.run_report.drawing import LIGHT, MARKERS, Chart, Key, Table, color_of_run, line
from meft_engine.run_report.reader import Record, Run

LOADS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 8.0)
"""Borders between the colours of loads: multiples of an even one. No load at all has a colour of its own."""

_LOAD_WORDS = ("none", "under ¼", "¼ to ½", "½ to 0.8", "0.8 to 1.25", "1.25 to 2", "2 to 4", "4 to 8", "8 and more")


def relative_loads(record: Record) -> list[list[float]]:
    """By layer and bin of experts, the load of an expert there as a multiple of an even one."""
    experts, width = record["experts"], record["experts_a_bin"]
    sizes = [min(width, experts - start) for start in range(0, experts, width)]
    found = []
    for load in record["load"]:
        even = sum(load) / experts
        found.append([part / (size * even) if even else 0.0 for part, size in zip(load, sizes, strict=False)])
    return found


def _level(load: float) -> int:
    return 0 if load == 0 else 1 + sum(load >= border for border in LOADS)


def expert_loads(run: Run, index: int, *, alone: bool) -> Chart | None:
    """A map of layers over experts.

    Args:
        index: of the run. alone: whether it is the only one, so that its name needs no mention.
    """
    if not run.layers or not run.start:
        return None
    record = run.layers[-1]
    loads, names = relative_loads(record), words.layer_numbers(run.start["layers"])
    columns, width = max(map(len, loads)), record["experts_a_bin"]

    def draw(axes: Axes) -> None:
        for level in range(len(_LOAD_WORDS)):
            boxes = _boxes([[_level(load) == level for load in of_layer] for of_layer in loads])
            if boxes is not None:
                axes.add_patch(PathPatch(boxes, facecolor=LIGHT[f"load{level}"], linewidth=0, snap=False))
        axes.set_xlim(0, columns)
        axes.set_ylim(len(loads), 0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        every = max(1, -(-len(names) // 8))
        axes.set_yticks([at + 0.5 for at in range(0, len(names), every)], names[::every])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at * width:.0f}"))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")

    levels = [_level(load) for of_layer in loads for load in of_layer]
    counts = [levels.count(level) for level in range(len(_LOAD_WORDS))]
    every = len(levels)
    parts = [f"{words.share(n / every)} {word}" for word, n in zip(_LOAD_WORDS, counts, strict=True) if n]
    ends = [(at * width, min((at + 1) * width, record["experts"])) for at in range(columns)]
    table = Table(
        ["layer", *(_span(first, end) for first, end in ends)],
        [[name, *of_layer] for name, of_layer in zip(run.start["layers"], record["load"], strict=True)],
        [None, *[words.plain] * columns],
        "Tokens of rank 0 that chose an expert of each column, over these steps.",
    )
    title = "Load of the experts" if alone else f"Load of the experts: {run.name}"
    about = f"Steps {record['since'] + 1} to {record['step']}; as multiples of an even load."
    if width > 1:
        about += f" A column is the mean of {width} neighbouring experts."
    legend = [Key(word, f"load{level}", filled=True) for level, word in enumerate(_LOAD_WORDS) if counts[level]]
    says = f"Shares of the map by load, as multiples of an even one: {', '.join(parts)}."
    return Chart(f"experts-{index}", title, says, draw, table, legend, max(2.4, 1.0 + 0.07 * len(loads)), about)


def _boxes(cells: list[list[bool]]) -> Path | None:
    """The outline of the cells that are so, neighbours of a row joined."""
    corners, codes = [], []
    for row, of_row in enumerate(cells):
        at = 0
        while at < len(of_row):
            end = at
            while end < len(of_row) and of_row[end]:
                end += 1
            if end > at:
                corners += [(at, row), (end, row), (end, row + 1), (at, row + 1), (at, row)]
                codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
            at = end + 1
    return Path(corners, codes) if corners else None


def row_updates(runs: Sequence[Run]) -> Chart | None:
    """How many rows have been updated how often since the first step."""
    runs = [run for run in runs if run.layers and run.layers[-1]["updates"]]
    if not runs:
        return None
    bins = max((run.layers[-1]["update_bins"] for run in runs), key=len)
    labels = [_span(low, high) for low, high in zip(bins, [*bins[1:], 2 * bins[-1]], strict=True)]
    counts = [[sum(of_bin) for of_bin in zip(*run.layers[-1]["updates"], strict=True)] for run in runs]
    counts = [[*of_run, *[0] * (len(bins) - len(of_run))] for of_run in counts]
    shares = [[count / sum(of_run) for count in of_run] for of_run in counts]
    keys = [Key(run.name, color_of_run(index), MARKERS[index % 8]) for index, run in enumerate(runs)]

    def draw(axes: Axes) -> None:
        at = list(range(len(bins)))
        if len(runs) == 1:
            axes.bar(at, shares[0], 0.82, color=LIGHT["run0"])
        else:
            for key, of_run in zip(keys, shares, strict=True):
                line(axes, at, of_run, key)
        axes.set_xticks(at, labels, rotation=35 if len(labels) > 7 else 0)
        axes.set_xlabel("updates of a row")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.share(value)))
        axes.grid(axis="y")

    rows = [[label, *(of_run[place] for of_run in counts)] for place, label in enumerate(labels)]
    columns = ["updates", *(run.name for run in runs)]
    table = Table(columns, rows, [None, *[words.plain] * len(runs)], "Rows, of all layers.")
    idle = "; ".join(f"{run.name}: {words.share(s[0])} of the rows never" for run, s in zip(runs, shares, strict=True))
    steps = ", ".join(dict.fromkeys(f"{run.layers[-1]['step']:,}" for run in runs))
    about = f"Share of all layers' rows that were touched so often by step {steps}."
    legend = keys if len(runs) > 1 else []
    return Chart("updates", "How often rows were updated", f"{idle}.", draw, table, legend, about=about)


def _span(low: int, high: int) -> str:
    return str(low) if high - low <= 1 else f"{low}–{high - 1}"


def by_layer(
    runs: Sequence[Run],
    key: str,
    title: str,
    values: Callable[[Record], list[float]],
    *,
    axis: Callable[[Axes], None],
) -> Chart | None:
    """A share of each layer, over the steps of the last record of the layers."""
    runs = [run for run in runs if run.layers and run.start]
    if not runs:
        return None
    found = [values(run.layers[-1]) for run in runs]
    names = words.layer_numbers(max((run.start["layers"] for run in runs), key=len))
    keys = [Key(run.name, color_of_run(index), MARKERS[index % 8]) for index, run in enumerate(runs)]

    def draw(axes: Axes) -> None:
        for one, of_run in zip(keys, found, strict=True):
            line(axes, list(range(len(of_run))), of_run, one)
        every = max(1, -(-len(names) // 10))
        axes.set_xticks(range(0, len(names), every), names[::every])
        axes.set_xlabel("layer")
        axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.share(value)))
        axes.grid(axis="y")

    rows = [[name, *(of_run[at] if at < len(of_run) else None for of_run in found)] for at, name in enumerate(names)]
    table = Table(["layer", *(run.name for run in runs)], rows, [None, *[words.share] * len(runs)])
    says = "; ".join(
        f"{run.name}: {words.share(min(v))} to {words.share(max(v))}, mean {words.share(sum(v) / len(v))}"
        for run, v in zip(runs, found, strict=True)
    )
    records = [run.layers[-1] for run in runs]
    when = "; ".join(dict.fromkeys(f"{record['since'] + 1:,} to {record['step']:,}" for record in records))
    return Chart(key, title, f"{says}.", draw, table, keys if len(runs) > 1 else [], about=f"Steps {when}.")


def dead(record: Record) -> list[float]:
    """Share of each layer's experts that no token chose."""
    return [count / record["experts"] for count in record["dead"]]


def of_layers(name: str) -> Callable[[Record], list[float]]:
    """A list of the record, as it is."""
    return lambda record: [run_log.number(value) for value in record[name]]
