"""The tables of a report. What a run brings along, such as its name, is escaped here and nowhere trusted."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from meft_engine.run_report import charts, words
from meft_engine.run_report.drawing import MARKERS, Key, Table, color_of_run, legend_mark
from meft_engine.run_report.reader import Run, differing, settings_of

STATES = {
    "not begun": "not begun",
    "going on": "in training",
    "finished": "finished",
    "failed": "ended by an error",
    "silent": "silent: it has not ended, and has written nothing for long",
}


ABSENT = object()
"""Where a cell has nothing to say."""


def cell(value: Any, word: Any = None) -> str:
    """A number with what it is exactly; anything else as it is."""
    if value is ABSENT or (value is None and word is not words.setting):
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool) and word is not None:
        return f'<data value="{value!r}">{html.escape(word(value))}</data>'
    return html.escape(words.setting(value))


def runs_table(runs: Sequence[Run], now: float) -> str:
    """A row for each run: the settings that are not the same in all, and what came of them."""
    settings, names = [settings_of(run) for run in runs], differing(runs)
    sets = list(dict.fromkeys(name for run in runs for name in run.scores()))
    results: list[tuple[str, Any, Any]] = [
        ("step", lambda run: run.last_step, words.plain),
        ("loss", lambda run: run.last("loss"), words.plain),
        *(
            (
                f"exact match: {name.replace('_', ' ')}",
                lambda run, name=name: next(
                    (r["exact_match"] for r in reversed(run.scores().get(name, {}).values())), None
                ),
                lambda value: f"{value:.3f}",
            )
            for name in sets
        ),
        ("a step", lambda run: charts.step_seconds(run) or None, words.duration),
        ("parameters", lambda run: run.start.get("adapter_parameters"), words.count),
        ("host", lambda run: sum(run.memory[-1]["host"].values()) if run.memory else None, words.size),
        ("device", lambda run: sum(run.memory[-1]["device"].values()) if run.memory else None, words.size),
        ("touched", lambda run: run.last("touched_share"), words.share),
    ]
    groups = "<tr><td></td><td></td>"
    if names:
        groups += f'<th scope="colgroup" colspan="{len(names)}">settings that differ</th>'
    groups += f'<th scope="colgroup" colspan="{len(results)}">results so far</th></tr>'
    heads = "".join(f'<th scope="col"><code>{html.escape(name)}</code></th>' for name in names)
    heads += "".join(f'<th scope="col">{html.escape(label)}</th>' for label, _, _ in results)
    rows = []
    for at, run in enumerate(runs):
        mark = legend_mark(Key(run.name, color_of_run(at), MARKERS[at % 8]))
        cells = "".join(f'<td class="differs">{cell(settings[at].get(n, ABSENT), words.setting)}</td>' for n in names)
        cells += "".join(f"<td>{cell(value(run), word)}</td>" for _, value, word in results)
        state = STATES[run.state(now)].partition(":")[0]
        rows.append(f'<tr><th scope="row">{mark} {html.escape(run.name)}</th><td>{state}</td>{cells}</tr>')
    heads = f'<tr><th scope="col">run</th><th scope="col">state</th>{heads}</tr>'
    table = f'<table class="runs"><thead>{groups}{heads}</thead><tbody>{"".join(rows)}</tbody></table>'
    alike = "" if names else '<p class="under">The settings of all runs are the same.</p>'
    return f"<section><h2>Runs</h2>{scrolling(table, 'Runs, their settings and results')}{alike}</section>"


def scrolling(table: str, label: str) -> str:
    """A box in which a table that is too wide or too long can be moved, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}">{table}</div>'


def numbers(table: Table) -> str:
    """The numbers of a picture."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{cell(v, word)}</td>" for v, word in zip(others, table.words[1:], strict=True))
        rows.append(f'<tr><th scope="row">{cell(first, table.words[0])}</th>{cells}</tr>')
    caption = f"<caption>{html.escape(table.note)}</caption>" if table.note else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def settings_table(runs: Sequence[Run]) -> str:
    """Everything that the runs were started with; what differs is marked."""
    settings, marked = [settings_of(run) for run in runs], set(differing(runs))
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    if not names:
        return ""
    head = "".join(f'<th scope="col">{html.escape(run.name)}</th>' for run in runs)
    rows = []
    for name in names:
        cells = "".join(f"<td>{cell(of_run.get(name, ABSENT), words.setting)}</td>" for of_run in settings)
        differs = ' class="differs"' if name in marked else ""
        rows.append(f'<tr{differs}><th scope="row"><code>{html.escape(name)}</code></th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">setting</th>{head}</tr></thead>'
    table = scrolling(f'<table class="settings">{head}<tbody>{"".join(rows)}</tbody></table>', "Settings")
    summary = f"<summary>All {len(names)}, derived ones filled in</summary>"
    return f"<section><h2>Settings</h2><details>{summary}{table}</details></section>"
