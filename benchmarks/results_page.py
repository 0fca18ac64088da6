"""Builds docs/results.md from the CSVs in benchmarks/results: ``make results``.

Every section names the command that makes its figures, the files that they stand in and the machine. What is not there
is said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import quality_page
from quality_page import figures_table, picture, read_lines

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"

_TOP = """# Results

What has been measured, from the files in [`benchmarks/results`](../benchmarks/results), by `make results`. [How each is
measured](../benchmarks/README.md) also says what the figures have to reach. The files do not record their dates; the
log of each does.
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    command: str
    files: tuple[str, ...]
    """Of the results; without the first there is nothing to show."""
    machine: str | None
    """The file that describes it."""
    body: Callable[[], Iterable[str]]
    missing: str
    """What to say where there is nothing to show; empty: nothing, not even the title."""

    def text(self) -> str:
        """In Markdown."""
        if not read_lines(self.files[0]):
            if not self.missing:
                return ""
            return f"## {self.title}\n\n`{self.command}`: {self.missing}\n"
        found = [name for name in self.files if (quality_page.RESULTS / name).is_file()]
        names = ", ".join(f"[`{name}`](../benchmarks/results/{name})" for name in found)
        source = f"`{self.command}` → {names}; {_machine(self.machine)}."
        return "\n\n".join([f"## {self.title}", source, *self.body()]) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([_TOP, *filter(None, (section.text() for section in SECTIONS))])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


def _machine(name: str | None) -> str:
    path = quality_page.RESULTS / name if name else None
    if path is None or not path.is_file():
        return "the machine is not recorded"
    lines = dict(line.partition(": ")[::2] for line in path.read_text(encoding="utf-8").splitlines())
    parts = [lines["CPU"], lines["cores"], lines["memory"].partition(",")[0]]
    return f"{', '.join(parts)} ([`{name}`](../benchmarks/results/{name}))"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(text: str, digits: int = 1, factor: float = 1.0) -> str:
    return f"{float(text) * factor:,.{digits}f}" if text else "–"


def _learning() -> Iterable[str]:
    stem = "quality_full" if read_lines("quality_full.csv") else "quality"
    parts = [f"quality{part}.csv" for part in ("", "_figures", "_losses")]
    names = ", ".join(f"[`{name}`](../benchmarks/results/{name})" for name in parts if read_lines(name))
    yield "SmolLM2-135M, closed-book questions about airports. [All tables](quality.md), by `make quality-page`."
    yield f"With 400 facts alone and fewer ablations, `make bench-quality` → {names}."
    yield figures_table(read_lines(f"{stem}_figures.csv"))
    yield picture(stem)


def _step() -> Iterable[str]:
    lines = [line for line in read_lines("step.csv") if line["case"] in ("default", "zero offload", "K = 64")]
    yield (
        "SmolLM2-135M, 8 × 64 tokens, fp32, a CPU as device. Lines of one case took turns. [What has changed\n"
        "since, and cost some per cent](../benchmarks/README.md#a-training-step)."
    )
    yield _table(
        ["case", "contestant", "rows", "ms a step", "quartiles", "touched rows", "counted MiB beyond the base"],
        [
            [
                line["case"],
                line["method"],
                line["rows"] if line["rows"] != "0" else "–",
                _number(line["median_ms"], 0),
                f"{_number(line['first_quartile_ms'], 0)} – {_number(line['third_quartile_ms'], 0)}",
                f"{float(line['touched_share']):.1%}" if line["method"] == "meft" else "–",
                _number(line["counted_bytes"], 0, 2**-20),
            ]
            for line in lines
        ],
    )
    yield "Of the adapter's step at 8192 rows:"
    yield _table(
        ["part", "what", "ms", "floor, ms"],
        [[p["phase"], p["what"], p["measured_ms"], p["floor_ms"]] for p in read_lines("step_profile.csv")],
    )
    yield picture("step")


def _optimizer() -> Iterable[str]:
    yield "A table of 16,384 × 4,096. The floor are touched bytes at the bandwidth of DeepSpeedCPUAdam's dense step."
    yield _table(
        ["", "touched", "ms", "GB/s", "time over floor"],
        [
            [
                line["contestant"],
                line["case"],
                _number(line["median_ms"], 2),
                _number(line["gb_per_s"]),
                _number(line["time_over_floor"], 2),
            ]
            for line in read_lines("optimizer.csv")
        ],
    )
    yield picture("optimizer")


def _ranks() -> Iterable[str]:
    measured = [
        line
        for line in read_lines("ranks.csv")
        if (line["width"], line["touched_percent"], line["overlap"]) == ("2048", "10", "random")
        or (line["width"] == "2048" and line["what"].startswith("dense"))
    ]
    yield "Four tables of 8,192 × 2,048; each rank touches 10 % of the rows, drawn at random."
    yield _table(
        ["what", "ranks", "nodes played", "precision on the way", "ms", "MB a rank sends", "modelled, ms"],
        [
            [
                line["what"],
                line["ranks"],
                line["nodes_played"],
                line["wire"],
                _number(line["median_ms"]),
                _number(line["bytes"], 1, 1e-6),
                _number(line["model_ms"]),
            ]
            for line in measured
        ],
    )
    modelled = [
        line
        for line in read_lines("ranks_model.csv")
        if (line["constants"], line["touched_percent"], line["overlap"], line["wire"])
        == ("cluster", "10", "random", "fp32")
        and int(line["ranks"]) >= 16
    ]
    yield "Beyond these nothing is measured. The model, for 64 tables of 8,192 × 4,096 on a cluster of 8 ranks a node:"
    yield _table(
        ["ranks", "s a step", "dense all-reduce, s", "GB a rank sends", "dense, GB"],
        [
            [
                line["ranks"],
                _number(line["seconds"], 2),
                _number(line["dense_seconds"], 2),
                _number(line["bytes"], 2, 1e-9),
                _number(line["dense_bytes"], 2, 1e-9),
            ]
            for line in modelled
        ],
    )
    yield picture("ranks")


def _checkpoints() -> Iterable[str]:
    yield "4 GB of rows in one layer, with moments 13 GB."
    yield _table(
        ["figure", "", "at most"],
        [
            [f"`{line['figure']}`", _number(line["value"], 2), line["at most"] or "–"]
            for line in read_lines("checkpoints.csv")
        ],
    )


def _plan() -> Iterable[str]:
    yield "What the planner said beforehand, and what the runs took."
    columns = ("case", "figure", "predicted", "measured", "off", "target")
    yield _table(columns, [[line[column] for column in columns] for line in read_lines("plan.csv")])


def _every(name: str) -> Callable[[], Iterable[str]]:
    """A file whose columns explain themselves."""

    def body() -> Iterable[str]:
        lines = read_lines(name)
        yield _table(list(lines[0]), [[cell or "–" for cell in line.values()] for line in lines])

    return body


SECTIONS = (
    Section(
        "What is learned",
        "make bench-quality-full",
        tuple(f"quality_full{part}.csv" for part in ("", "_figures", "_losses")),
        None,
        _learning,
        "not yet; `make bench-quality` gives a part of it, on [a page of its own](quality.md).",
    ),
    Section(
        "A training step",
        "make bench-speed",
        ("step.csv", "step_profile.csv"),
        "step_machine.txt",
        _step,
        "not yet.",
    ),
    Section(
        "The row optimizer",
        "make bench-optimizer",
        ("optimizer.csv",),
        "machine.txt",
        _optimizer,
        "not yet.",
    ),
    Section(
        "Several ranks",
        "make bench-ranks",
        ("ranks.csv", "ranks_model.csv"),
        None,
        _ranks,
        "not yet.",
    ),
    Section(
        "Saving and loading",
        "make bench-checkpoints",
        ("checkpoints.csv",),
        None,
        _checkpoints,
        "not yet.",
    ),
    Section("What is planned", "make bench-plan", ("plan.csv",), "plan_machine.txt", _plan, ""),
    Section(
        "On a GPU",
        "make bench-gpu",
        ("gpu.csv",),
        None,
        _every("gpu.csv"),
        "not yet. Of the present code no figure was measured on a card; [what has been shown without one](gpu.md).",
    ),
)


if __name__ == "__main__":
    main()
