"""The page: one HTML file that asks for nothing outside itself."""

from __future__ import annotations

import functools
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files

from meft_engine import __version__
from meft_engine.run_report import charts, layer_charts, words
from meft_engine.run_report.drawing import DARK, LIGHT, Chart, legend_mark, variables
from meft_engine.run_report.reader import Run
from meft_engine.run_report.tables import STATES, cell, numbers, runs_table, scrolling, settings_table

MOST_POINTS = 400
"""Readings of a run that a page shows; of more, every other one, every third one and so on, and the last."""


def thin(run: Run) -> int:
    """Leave a run no more readings than a page shows.

    Returns:
        1 if all are left, else of how many there is one.
    """
    every = -(-len(run.steps) // MOST_POINTS)
    if every > 1:
        run.steps = [*run.steps[:-1][::every], run.steps[-1]]
    return max(1, every)


def sections(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """The pictures that these runs have something for, under their headings."""
    shown = [run for run in runs if run.start]
    heats = [layer_charts.expert_loads(run, index, alone=len(runs) == 1) for index, run in enumerate(runs)]
    over, layers = charts.figure_over_steps, functools.partial(layer_charts.by_layer, shown)
    found = {
        "Learning": [charts.loss(shown), charts.exact_match(runs)],
        "Time and traffic": [
            charts.time_by_phase(shown),
            over(
                shown,
                "bytes",
                "Bytes moved",
                {"bytes_to_device": "to the device", "bytes_to_host": "to the host"},
                words.size,
                about="Rows and their gradients, a step; where device and host are one, what would cross.",
            ),
        ],
        "Memory": [charts.memory(shown, "host"), charts.memory(shown, "device")],
        "Routing": [
            *heats,
            layer_charts.row_updates(shown),
            over(
                shown,
                "touched",
                "Rows touched",
                {"touched_share": ""},
                words.share,
                axis=charts.of_share,
                about="Share of a layer's rows that a micro-batch activates, mean of all layers.",
            ),
            layers(
                "touched-by-layer", "Rows touched, by layer", layer_charts.of_layers("touched"), axis=charts.of_share
            ),
            over(
                shown,
                "dead",
                "Dead experts",
                {"dead_experts": ""},
                words.share,
                about="Share of the experts that no token chose between two readings, mean of all layers.",
            ),
            layers("dead-by-layer", "Dead experts, by layer", layer_charts.dead, axis=charts.from_zero),
            over(
                shown,
                "kept",
                "Mass that the cap kept",
                {"kept_mass": ""},
                words.share,
                axis=charts.up_to_one,
                about="Share of the activation that active_rows.cap left, mean of all layers.",
            ),
            layers(
                "kept-by-layer",
                "Mass that the cap kept, by layer",
                layer_charts.of_layers("kept"),
                axis=charts.up_to_one,
            ),
        ],
    }
    whole = [(title, [chart for chart in of_title if chart is not None]) for title, of_title in found.items()]
    return [(title, of_title) for title, of_title in whole if of_title]


def page(
    runs: Sequence[Run],
    drawn: Sequence[tuple[str, Sequence[Chart]]],
    *,
    every: Sequence[int] = (),
    refresh: float | None = None,
    now: float,
) -> str:
    """The whole file.

    Args:
        drawn: of :func:`sections`. every: of each run, of how many readings one is shown.
        refresh: seconds after which a browser shall load it again. now: the time, for what is going on.
    """
    names = ", ".join(run.name for run in runs)
    head = f'<meta http-equiv="refresh" content="{max(1, round(refresh))}">' if refresh else ""
    body = [_header(runs, now, refresh), _tiles(runs[0]) if len(runs) == 1 else runs_table(runs, now)]
    for title, of_title in drawn:
        figures = "".join(map(_figure, of_title))
        body.append(f'<section><h2>{title}</h2><div class="charts">{figures}</div></section>')
    body.append(settings_table(runs))
    body.append(_footer(runs, every))
    style = files("meft_engine.run_report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{head}
<link rel="icon" href="data:,">
<title>{html.escape(names)} · MEFT</title>
<style>
:root{{{variables(LIGHT)}}}
@media (prefers-color-scheme: dark){{:root{{{variables(DARK)}}}}}
{style}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
<script type="application/json" id="numbers">{_numbers(runs)}</script>
</body>
</html>
"""


def _numbers(runs: Sequence[Run]) -> str:
    """What the page shows, as the runs' files have it; nothing in it can end the element that holds it."""
    found = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "start": run.start,
            "steps": run.steps,
            "layers": run.layers[-1:],
            "memory": run.memory[-1:],
            "validations": run.validations,
            "evaluations": run.evaluations,
            "end": run.end,
            "train_report": run.report,
        }
        for run in runs
    ]
    return json.dumps(found, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


# --- parts


def _header(runs: Sequence[Run], now: float, refresh: float | None) -> str:
    if len(runs) > 1:
        states = [run.state(now) for run in runs]
        parts = [f"{states.count(state)} {STATES[state].partition(':')[0]}" for state in STATES if state in states]
        title, under = f"{len(runs)} runs", ", ".join(parts)
    else:
        (run,) = runs
        state = run.state(now)
        title = html.escape(run.name)
        under = f'<span class="state {state.replace(" ", "-")}">{STATES[state]}</span>'
        if state == "failed":
            under += f" {html.escape(str(run.end['error']))}"
        if run.start:
            under += f" · {html.escape(words.model(run.start['model']))}"
            under += f" · step {run.last_step:,}, {words.moment(run.last_news)}"
        if run.resumes:
            under += f" · resumed {'once' if run.resumes == 1 else f'{run.resumes} times'}"
    if refresh:
        under += f" · this page follows, every {words.duration(refresh)}"
    return f'<header><p class="kind">MEFT report</p><h1>{title}</h1><p class="under">{under}</p></header>'


def _tiles(run: Run) -> str:
    """What matters of one run, in large letters."""
    tiles = []

    def tile(label: str, value: str, more: str = "") -> None:
        tiles.append(f"<div><dt>{html.escape(label)}</dt><dd>{value}<small>{html.escape(more)}</small></dd></div>")

    for name, of_steps in run.scores().items():
        values = [cell(result["exact_match"], lambda v: f"{v:.3f}") for result in of_steps.values()]
        shown = values[0] if len(values) == 1 else f'{values[0]}<span class="to">→</span>{values[-1]}'
        count = list(of_steps.values())[-1]["count"]
        tile(f"exact match, {name.replace('_', ' ')}", shown, f"{count:,} questions")
    if run.last("loss") is not None:
        first, last = run.figure("loss")[1][0], run.last("loss")
        tile("loss", cell(last, words.plain), f"{words.plain(first)} at the first reading")
    if run.steps:
        seconds = charts.step_seconds(run)
        typical = run.report.get("seconds_per_step")
        if seconds or typical:
            kind = "median" if typical else "mean"
            more = f"{kind}; {run.last_step:,} steps took {words.duration(run.seconds)}"
            tile("a step takes", cell(typical or seconds, words.duration), more)
    if run.start:
        start = run.start
        ratio = start["adapter_parameters"] / max(1, start["base_parameters"])
        rows = f"{len(start['layers'])} layers × {start['rows']:,} rows, {words.share(ratio)} of the base"
        tile("adapter parameters", cell(start["adapter_parameters"], words.count), rows)
    if run.memory and run.start:
        host, device = run.memory[-1]["host"], run.memory[-1]["device"]
        more = f"planned {words.size(sum(charts.planned_bytes(run, 'host').values()))}"
        tile("in host memory", cell(sum(host.values()), words.size), more)
        more = f"dense adapter: {words.size(run.start['dense_device_bytes'])}"
        tile("on the device", cell(sum(device.values()), words.size), more)
    if run.last("touched_share") is not None:
        tile("rows touched", cell(run.last("touched_share"), words.share), "by a micro-batch, of a layer's")
    if run.steps:
        samples = run.steps[-1]["samples"]
        tile("seen", f"{cell(samples, words.count)} samples", f"{words.count(run.tokens)} tokens routed on rank 0")
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else "<p>No step has been taken yet.</p>"


def _figure(chart: Chart) -> str:
    legend = "".join(f"<li>{legend_mark(key)} {html.escape(key.label)}</li>" for key in chart.legend)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    about = f"<p>{html.escape(chart.about)}</p>" if chart.about else ""
    caption = f"<figcaption><h3>{html.escape(chart.title)}</h3>{about}</figcaption>"
    return (
        f'<figure id="{chart.key}">{caption}{chart.svg()}{legend}'
        f"<details><summary>Numbers</summary>{scrolling(numbers(chart.table), chart.title)}</details></figure>"
    )


def _footer(runs: Sequence[Run], every: Sequence[int]) -> str:
    notes = [f"{run.name}: one of {n} readings" for run, n in zip(runs, every, strict=False) if n > 1]
    for run in runs:
        spoilt = sum(not math.isfinite(value) for value in run.figure("loss")[1])
        notes += [f"{run.name}: {spoilt} readings with a loss that is not finite"] if spoilt else []
    shown = f"<p>{html.escape('. '.join(notes))}.</p>" if notes else ""
    devices = "; ".join(dict.fromkeys(_machine(run) for run in runs if run.start))
    return f"<footer>{shown}<p>{html.escape(devices)}</p><p>meft_engine {__version__}</p></footer>"


def _machine(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.start["versions"].items())
    ranks = run.start["ranks"]
    ranks = f"{ranks} rank" if ranks == 1 else f"{ranks} ranks"
    return f"{run.start['device']}, {ranks}, ZeRO stage {run.start['zero_stage']}; {versions}"
