"""Builds docs/quality.md from the CSVs that quality.py wrote: ``python benchmarks/quality_page.py``."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from meft_engine.config import MeftConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quality.md"
NAMES = {
    "meft": "MEFT, {size} rows",
    "lora_16": "LoRA, rank {size}",
    "lora_equal_bytes": "LoRA of as many bytes, rank {size}",
    "dense": "dense adapter, {size} rows",
}
Line = dict[str, str]
TEMPLATE = ROOT / "benchmarks" / "learning" / "page.md"


def main() -> None:
    """Write the page."""
    lines = read_lines("quality_full.csv") or read_lines("quality.csv")
    if not lines:
        sys.exit(f"{RESULTS} holds neither quality.csv nor quality_full.csv; run `make bench-quality` first")
    stem = "quality_full" if read_lines("quality_full.csv") else "quality"
    compared = list(dict.fromkeys(line["facts"] for line in lines if line["study"] == "methods"))
    methods = []
    for facts in compared:
        methods += [_methods([line for line in lines if line["facts"] == facts])]
        methods += [picture(stem if facts == compared[0] else f"{stem}_{facts}")]
    few = [line for line in lines if line["facts"] == compared[0]]
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = template.substitute(
        figures=figures_table(read_lines(f"{stem}_figures.csv")),
        methods="\n\n".join(methods),
        sparsity=f"{_sparsity(few)}\n\n{picture(f'{stem}_sparsity')}",
        sizes=_sizes(few),
        ablations=_ablations(lines),
    )
    PAGE.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(PAGE.relative_to(ROOT))


def read_lines(name: str) -> list[Line]:
    """A file of the results, by columns; nothing where there is none."""
    path = RESULTS / name
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def figures_table(lines: Sequence[Line]) -> str:
    """The figures that have targets."""
    table = ["| | figure | target | |", "|---|---|---|---|"]
    for line in lines:
        mark = "reached" if line["reached"] == "yes" else "**missed**"
        what = line["what"][0].upper() + line["what"][1:]
        table.append(f"| {what} (`{line['figure']}`) | {float(line['value']):.3f} | {line['target']} | {mark} |")
    return "\n".join(table)


def picture(stem: str) -> str:
    """A picture of the results, as a page in docs/ shows it."""
    return f"![{stem.replace('_', ' ')}](../benchmarks/results/{stem}.png)"


def _best(lines: Iterable[Line], label: str, study: str = "methods") -> list[Line]:
    """The lines with the chosen learning rate: the one with the lowest loss on what was trained, on seed 0."""
    own = [line for line in lines if line["study"] == study and line["label"] == label]
    if not own:
        return []
    first = min((line for line in own if line["seed"] == "0"), key=lambda line: float(line["trained_loss"]))
    return [line for line in own if line["learning_rate"] == first["learning_rate"]]


def _mean(lines: Sequence[Line], column: str) -> float:
    return statistics.fmean(float(line[column]) for line in lines)


def _with_spread(lines: Sequence[Line], column: str) -> str:
    values = [float(line[column]) for line in lines]
    return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def _deviation(groups: Iterable[Sequence[Line]], column: str) -> float:
    """Standard deviation within groups, from all of them together: two or three seeds alone would tell little."""
    squares, freedom = 0.0, 0
    for group in groups:
        values = [float(line[column]) for line in group]
        squares += statistics.pvariance(values) * len(values)
        freedom += len(values) - 1
    return (squares / freedom) ** 0.5


def _apart(one: Sequence[Line], other: Sequence[Line], column: str, deviation: float) -> bool:
    """Whether the means of two groups are farther apart than twice the standard error of their difference."""
    error = deviation * (1 / len(one) + 1 / len(other)) ** 0.5
    return abs(_mean(one, column) - _mean(other, column)) > 2 * error


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _sizes(lines: Sequence[Line]) -> str:
    table = [
        "## Exact match against size",
        "",
        "Of the learning rates that were tried with each size, the one with the lowest loss on what was trained.",
        "",
        "| | learning rate | exact match | second wording | perplexity | on the device "
        "| touched by a micro-batch of questions, of text |",
        "|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple[str, str], Line] = {}
    for line in lines:
        if line["study"] == "sizes":
            size = line["label"], line["settings"]
            best[size] = min(line, best.get(size, line), key=lambda line: float(line["trained_loss"]))
    for line in best.values():
        share = ""
        if line["method"] == "meft":
            share = f"{float(line['touched_last_epoch']):.1%}, {float(line['text_touched_end']):.1%}"
        cells = [
            f"{line['label']}, {line['settings'].split(', ')[0]}",
            f"{float(line['learning_rate']):g}",
            f"{float(line['exact_match']):.3f}",
            f"{float(line['second_wording']):.3f}",
            _perplexity(float(line["perplexity_after"])),
            f"{float(line['device_mib']):.0f} MiB",
            share,
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _methods(lines: Sequence[Line]) -> str:
    table = [
        f"## {int(lines[0]['facts']):,} facts",
        "",
        "| | learning rate | exact match | second wording | perplexity | on the device | step, one core |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name in NAMES.items():
        best = _best(lines, method)
        if not best:
            continue
        settings = dict(part.split(" = ") for part in best[0]["settings"].split(", ") if " = " in part)
        size = settings.get("rank") or settings.get("rows") or MeftConfig().adapter.rows
        cells = [
            name.format(size=size),
            f"{float(best[0]['learning_rate']):g}",
            _with_spread(best, "exact_match"),
            _with_spread(best, "second_wording"),
            f"{_mean(best, 'perplexity_before'):.1f} → {_perplexity(_mean(best, 'perplexity_after'))}",
            f"{_mean(best, 'device_mib'):.0f} MiB",
            f"{_mean(best, 'seconds_per_step'):.2f} s",
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*table, "", "Means over three seeds, ± half the range."])


def _sparsity(lines: Sequence[Line]) -> str:
    table = [
        "## How sparse it is",
        "",
        "Rows that are touched, by a micro-batch of questions and by 512 tokens of text (four such), without a cap.",
        "",
        "| | exact match | by questions, first → last epoch | by text, start → end (four) "
        "| kept by a cap of 10 %, 30 % | shared, start → end |",
        "|---|---|---|---|---|---|",
    ]
    groups = {"defaults": _best(lines, "meft")}
    for line in lines:
        if line["study"] == "sparsity" or (line["study"] == "ablations" and "center" in line["label"]):
            groups[line["label"]] = _best(lines, line["label"], line["study"])
    for label, group in groups.items():
        if group[0]["method"] != "meft":
            continue
        table.append(
            f"| {label} | {_with_spread(group, 'exact_match')} | {_mean(group, 'touched_first_epoch'):.1%} → "
            f"{_mean(group, 'touched_last_epoch'):.1%} | {_mean(group, 'text_touched_start'):.1%} → "
            f"{_mean(group, 'text_touched_end'):.1%} ({_mean(group, 'text_touched_window'):.1%}) | "
            f"{_mean(group, 'text_kept_at_10pct'):.3f}, {_mean(group, 'text_kept_at_30pct'):.3f} | "
            f"{_mean(group, 'text_shared_start'):.0%} → {_mean(group, 'text_shared_end'):.0%} |"
        )
    return "\n".join(table)


def _ablations(lines: Sequence[Line]) -> str:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line["study"] == "ablations":
            groups.setdefault(line["label"], []).append(line)
    if not groups:
        return ""
    defaults = groups["defaults"]
    columns = ("exact_match", "second_wording")
    deviations = trained, second = [_deviation(groups.values(), column) for column in columns]
    table = [
        "## One thing changed at a time",
        "",
        f"{defaults[0]['facts']} facts; three seeds of the defaults, two of the others, ± half the range. What is",
        "**bold** is farther from the defaults than twice the standard error of the difference. Between seeds, over",
        f"all lines, the standard deviation is {trained:.3f}, in the second wording {second:.3f}.",
        "",
        "| | exact match | second wording | perplexity | touched by a micro-batch | dead experts | same fact | step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, group in groups.items():
        sparse = group[0]["method"] == "meft"
        touched, dead, same = (
            f"{_mean(group, column):.1%}" if sparse else ""
            for column in ("touched_last_epoch", "dead_experts", "same_fact")
        )
        matches = []
        for column, deviation in zip(columns, deviations, strict=True):
            shown = _with_spread(group, column)
            matches.append(f"**{shown}**" if _apart(group, defaults, column, deviation) else shown)
        table.append(
            f"| {label} | {' | '.join(matches)} | {_perplexity(_mean(group, 'perplexity_after'))} | {touched} | {dead} "
            f"| {same} | {_mean(group, 'seconds_per_step'):.2f} s |"
        )
    return "\n".join(table)


if __name__ == "__main__":
    main()
