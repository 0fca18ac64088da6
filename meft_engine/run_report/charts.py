"""The pictures of a report that run over the steps, or hold one bar for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from meft_engine import run_log
from meft_engine.run_report import words
from meft_engine.run_report.drawing import LIGHT, MARKERS, Chart, Key, Table, color_of_run, line, steps_axis
from meft_engine.run_report.reader import Run

Series = list[tuple[Key, list[int], list[float]]]


def _keys(runs: Sequence[Run], run: int, parts: Sequence[str], part: int) -> Key:
    """Several runs have a colour and a marker each, and parts their dashes; of one run the parts have the colours."""
    if len(runs) == 1:
        return Key(parts[part] or runs[0].name, color_of_run(part), MARKERS[part % 8], part)
    label = f"{runs[run].name}, {parts[part]}" if parts[part] else runs[run].name
    return Key(label, color_of_run(run), MARKERS[run % 8], part)


def _table(series: Series, word: Callable[[float], str]) -> Table:
    steps = sorted({step for _, x, _ in series for step in x})
    by_step = [dict(zip(x, y, strict=True)) for _, x, y in series]
    rows = [[step, *(values.get(step) for values in by_step)] for step in steps]
    return Table(["step", *(key.label for key, _, _ in series)], rows, [words.plain, *[word] * len(series)])


def _says(series: Series, word: Callable[[float], str]) -> str:
    parts = [f"{key.label}: {word(y[0])} at step {x[0]}, {word(y[-1])} at step {x[-1]}" for key, x, y in series if x]
    return "; ".join(parts) + "."


def _over_steps(
    key: str,
    title: str,
    series: Series,
    word: Callable[[float], str],
    *,
    axis: Callable[[Axes], None] | None = None,
    tick: Callable[[float], str] = words.tick,
    about: str = "",
) -> Chart | None:
    series = [one for one in series if one[1]]
    if not series:
        return None

    def draw(axes: Axes) -> None:
        unit, name = words.unit_of(max(value for _, _, y in series for value in y)) if word is words.size else (1, "")
        for one, x, y in series:
            line(axes, x, [value / unit for value in y], one)
        steps_axis(axes)
        steps = {step for _, x, _ in series for step in x}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, max(steps) + 1)
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        if axis is not None:
            axis(axes)

    legend = [one for one, _, _ in series] if len(series) > 1 else []
    return Chart(key, title, _says(series, word), draw, _table(series, word), legend, about=about)


def of_share(axes: Axes) -> None:
    """From nothing to all."""
    axes.set_ylim(-0.02, 1.02)


def loss(runs: Sequence[Run]) -> Chart | None:
    """Of training, and of a Trainer's evaluation where there was one."""
    series: Series = []
    names = list(dict.fromkeys(name for run in runs for r in run.validations for name in r["figures"]))
    names = [name for name in names if name.endswith("loss")]
    parts = ["training" if names else "", *(name.removeprefix("eval_").replace("loss", "validation") for name in names)]
    for index, run in enumerate(runs):
        series.append((_keys(runs, index, parts, 0), *run.figure("loss")))
        for part, name in enumerate(names, 1):
            found = [r for r in run.validations if name in r["figures"]]
            values = [run_log.number(r["figures"][name]) for r in found]
            series.append((_keys(runs, index, parts, part), [r["step"] for r in found], values))

    def axis(axes: Axes) -> None:
        values = [value for _, _, y in series for value in y if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))

    about = "Mean of the steps since the reading before."
    return _over_steps("loss", "Loss", series, words.plain, axis=axis, about=about)


def exact_match(runs: Sequence[Run]) -> Chart | None:
    """Of the sets of questions that ``launch/evaluate.py`` was asked about."""
    sets = list(dict.fromkeys(name for run in runs for name in run.scores()))
    parts = [name.replace("_", " ") for name in sets]
    series: Series = []
    for index, run in enumerate(runs):
        for part, name in enumerate(sets):
            found = {step: run_log.number(r["exact_match"]) for step, r in run.scores().get(name, {}).items()}
            series.append((_keys(runs, index, parts, part), list(found), list(found.values())))
    chart = _over_steps("exact-match", "Exact match", series, words.plain, axis=of_share)
    if chart is not None:
        if len(runs) > 1 and len({step for _, steps, _ in series for step in steps}) == 1:
            _as_bars(chart, runs, sets, parts)
        counts = {name: r["count"] for run in runs for name in sets for r in run.scores().get(name, {}).values()}
        asked = ", ".join(f"{counts[name]} of {label}" for name, label in zip(sets, parts, strict=True))
        chart.about = f"Share of the questions whose greedy answer is the true one: {asked}."
    return chart


def _as_bars(chart: Chart, runs: Sequence[Run], sets: Sequence[str], parts: Sequence[str]) -> None:
    """Draw what was asked once, at the same step, with a bar for each run and set of questions."""
    thick = 0.8 / len(sets)

    def draw(axes: Axes) -> None:
        for part, name in enumerate(sets):
            for at, run in enumerate(runs):
                for result in run.scores().get(name, {}).values():
                    value, y = run_log.number(result["exact_match"]), at - 0.4 + (part + 0.5) * thick
                    axes.barh(y, value, 0.86 * thick, color=LIGHT[color_of_run(part)])
                    beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
                    axes.annotate(f"{value:.3f}", (value, y), fontsize=8, color=LIGHT["muted"], **beside)
        runs_axis(axes, [run.name for run in runs])
        axes.set_xlim(0, 1.13)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])

    chart.draw, chart.height = draw, max(1.6, 0.5 + max(0.42, 0.22 * len(sets)) * len(runs))
    chart.legend = [Key(part, color_of_run(at), filled=True) for at, part in enumerate(parts)] if len(sets) > 1 else []


def figure_over_steps(
    runs: Sequence[Run],
    key: str,
    title: str,
    names: dict[str, str],
    word: Callable[[float], str],
    *,
    axis: Callable[[Axes], None] | None = None,
    about: str = "",
) -> Chart | None:
    """Figures of the readings.

    Args:
        names: of the figures, and what the page calls them; an empty word where there is one alone.
    """
    parts = list(names.values())
    series = [
        (_keys(runs, index, parts, part), *run.figure(name))
        for index, run in enumerate(runs)
        for part, name in enumerate(names)
    ]

    tick = words.share if word is words.share else words.tick
    return _over_steps(key, title, series, word, axis=axis or from_zero, tick=tick, about=about)


def from_zero(axes: Axes) -> None:
    """As far up as needed; but what is next to nothing shall look like it."""
    axes.set_ylim(0, max(axes.get_ylim()[1], 0.05))


def up_to_one(axes: Axes) -> None:
    """As far down as needed; but what is next to all shall look like it."""
    axes.set_ylim(min(axes.get_ylim()[0], 0.8), 1.01)


def phase_seconds(run: Run) -> dict[str, float]:
    """Mean seconds of a step in each phase, of all readings but the first, in which things are still being made."""
    records = run.steps[1:] if len(run.steps) > 2 else run.steps
    names = [name for name in words.PHASES if any(f"seconds/{name}" in r["figures"] for r in records)]
    of_name = {n: [run_log.number(r["figures"].get(f"seconds/{n}", 0.0)) for r in records] for n in names}
    return {name: sum(values) / len(values) for name, values in of_name.items()}


def step_seconds(run: Run) -> float:
    """Mean seconds of a step, without those of saving."""
    return sum(seconds for name, seconds in phase_seconds(run).items() if name != "save")


def time_by_phase(runs: Sequence[Run]) -> Chart | None:
    """Over the readings of one run; side by side, of several."""
    runs = [run for run in runs if any(name.startswith("seconds/") for name in run.figures())]
    if not runs:
        return None
    return _phases_of_one(runs[0]) if len(runs) == 1 else _phases_of_several(runs)


def _phase_keys(names: Sequence[str]) -> list[Key]:
    return [Key(words.PHASES[name], name, filled=True) for name in names]


def _phases_of_one(run: Run) -> Chart:
    means = phase_seconds(run)
    steps = [record["step"] for record in run.steps]
    of_phase = {n: [run_log.number(r["figures"].get(f"seconds/{n}", 0.0)) for r in run.steps] for n in means}

    def draw(axes: Axes) -> None:
        ends = [run.start.get("step", 0) if steps[0] > run.start.get("step", 0) else 0, *steps]
        widths = [max(1, later - earlier) for earlier, later in zip(ends, steps, strict=False)]
        at, bottom = [step - width / 2 for step, width in zip(steps, widths, strict=True)], [0.0] * len(steps)
        for name, values in of_phase.items():
            axes.bar(at, values, widths, bottom, color=LIGHT[name], edgecolor=LIGHT["surface"], linewidth=0.4)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        steps_axis(axes)
        axes.set_ylabel("seconds a step")

    rows = [[step, *(values[at] for values in of_phase.values())] for at, step in enumerate(steps)]
    table = Table(["step", *(words.PHASES[n] for n in means)], rows, [words.plain, *[words.duration] * len(means)])
    return Chart("phases", "Where a step's time goes", _phases_say(run, means), draw, table, _phase_keys(means)[::-1])


def _phases_of_several(runs: Sequence[Run]) -> Chart:
    means = [phase_seconds(run) for run in runs]
    names = [name for name in words.PHASES if any(name in of_run for of_run in means)]

    def draw(axes: Axes) -> None:
        left = [0.0] * len(runs)
        for name in names:
            values = [of_run.get(name, 0.0) for of_run in means]
            at = range(len(runs))
            axes.barh(at, values, 0.7, left, color=LIGHT[name], edgecolor=LIGHT["surface"], linewidth=0.4)
            left = [low + value for low, value in zip(left, values, strict=True)]
        runs_axis(axes, [run.name for run in runs])
        axes.set_xlabel("seconds a step")

    rows = [[words.PHASES[name], *(of_run.get(name) for of_run in means)] for name in names]
    rows.append(["all", *(sum(of_run.values()) for of_run in means)])
    table = Table(["phase", *(run.name for run in runs)], rows, [None, *[words.duration] * len(runs)])
    says = " ".join(_phases_say(run, of_run) for run, of_run in zip(runs, means, strict=True))
    chart = Chart("phases", "Where a step's time goes", says, draw, table, _phase_keys(names))
    chart.height, chart.about = max(1.6, 0.5 + 0.42 * len(runs)), "Means over the run, without its first reading."
    return chart


def _phases_say(run: Run, means: dict[str, float]) -> str:
    parts = [f"{words.PHASES[name]} {words.duration(value)}" for name, value in means.items()]
    return f"{run.name}, mean of a step: {', '.join(parts)}; together {words.duration(sum(means.values()))}."


def runs_axis(axes: Axes, names: Sequence[str], most: int = 22) -> None:
    """Names from top to bottom beside horizontal bars."""
    axes.set_yticks(range(len(names)), [shortened(name, most) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def shortened(name: str, most: int) -> str:
    """Its beginning and its end: runs of a sweep have their number there, those of a person's their difference here."""
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"


def memory(runs: Sequence[Run], place: str) -> Chart | None:
    """Bytes by kind as they are allocated, beside what was worked out before.

    Args:
        place: ``"host"`` or ``"device"``.
    """
    runs = [run for run in runs if run.memory and run.start]
    if not runs:
        return None
    kinds = {"host": words.HOST, "device": words.DEVICE}[place]
    measured = [run.memory[-1][place] for run in runs]
    planned = [planned_bytes(run, place) for run in runs]
    kinds = {kind: label for kind, label in kinds.items() if any(of.get(kind) for of in planned + measured)}
    if not kinds:
        return None
    unit, name = words.unit_of(max(max(of_kind.values(), default=0) for of_kind in planned + measured))
    thick = 0.8 / len(runs)

    def draw(axes: Axes) -> None:
        for index, (m, p) in enumerate(zip(measured, planned, strict=True)):
            for at, kind in enumerate(kinds):
                y = at - 0.4 + (index + 0.5) * thick
                color = LIGHT[color_of_run(index)]
                axes.barh(y, m.get(kind, 0) / unit, 0.86 * thick, color=color)
                axes.barh(y, p.get(kind, 0) / unit, 0.86 * thick, facecolor="none", edgecolor=LIGHT["ink"], linewidth=1)
        runs_axis(axes, list(kinds.values()), most=30)
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))

    columns = [f"{run.name}, {what}" if len(runs) > 1 else what for run in runs for what in ("measured", "planned")]
    pairs = list(zip(measured, planned, strict=True))
    rows: list[list[Any]] = [
        [label, *(of.get(kind, 0) for pair in pairs for of in pair)] for kind, label in kinds.items()
    ]
    rows.append(["all", *(sum(of.values()) for pair in pairs for of in pair)])
    says = "; ".join(
        f"{run.name}: {words.size(sum(m.values()))} measured, {words.size(sum(p.values()))} planned"
        for run, (m, p) in zip(runs, pairs, strict=True)
    )
    legend = [Key(run.name, color_of_run(index), filled=True) for index, run in enumerate(runs)]
    about = "Filled: as allocated. Outlined: as planned before anything was."
    if place == "device" and all(run.start["device_is_host"] for run in runs):
        about += " There was no device apart from the host; filled is what one would have needed at hand so far."
    if any(run.start["ranks"] > 1 for run in runs):
        about += " Of rank 0, or its part of what a node's ranks share."
    table = Table(["kind", *columns], rows, [None, *[words.size] * len(columns)])
    title = {"host": "Host memory, by kind", "device": "Device memory, by kind"}[place]
    height = 0.75 + len(kinds) * max(0.32, 0.2 * len(runs))
    return Chart(f"memory-{place}", title, f"{says}.", draw, table, legend if len(runs) > 1 else [], height, about)


def planned_bytes(run: Run, place: str) -> dict[str, int]:
    """By kind; of a node's host memory, the part of one rank."""
    planned = run.start["planned"]
    part = planned["ranks_of_node"] if place == "host" else 1
    return {kind: count // part for kind, count in planned[place].items()}
