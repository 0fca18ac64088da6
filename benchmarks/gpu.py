"""Everything of MEFT that only a GPU can tell, in stages: correctness, kernels, bandwidth, sanitizer, fit24.

``--tiny`` runs all of it without a card, on small tensors, to show that it runs. Writes a CSV; the last line is one
JSON object. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_process
import torch
from gpu_machine import facts
from gpu_marks import MARKS, verdicts
from gpu_training import add_arguments
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """A program and its arguments; ``interpreted``: what it runs without a card are Triton's kernels."""

    program: str
    arguments: tuple[str, ...] = ()
    interpreted: bool = True


STAGES = {
    "correctness": Stage("gpu_checks.py", ("correctness",)),
    "kernels": Stage("gpu_kernels.py"),
    "bandwidth": Stage("gpu_bandwidth.py"),
    "sanitizer": Stage("gpu_checks.py", ("sanitizer",)),
    "fit24": Stage("gpu_training.py", interpreted=False),
}
SECONDS = 600
"""That a stage may take."""


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}, or all, which is the default")
    parser.add_argument("--tiny", action="store_true", help="whether it runs: small tensors, no card, two minutes")
    parser.add_argument("--output", type=Path, help="folder for gpu.csv")
    add_arguments(parser)
    given = parser.parse_args()
    unknown = sorted({*given.stages} - {*STAGES, "all"})
    if unknown:
        parser.error(f"no stage is named {', '.join(unknown)}; there are {', '.join(STAGES)} and all")
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --tiny runs everything on small tensors without one")
    chosen = [name for name in STAGES if name in given.stages or not given.stages or "all" in given.stages]

    figures: dict[str, Any] = {"tiny": given.tiny, **facts()}
    for name in chosen:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        figures[name] = run(name, given)
        figures[name]["stage_seconds"] = round(time.monotonic() - began, 1)
        error = f"failed ({figures[name]['error']}) and " if "error" in figures[name] else ""
        print(f"{name} {error}took {figures[name]['stage_seconds']:.0f} s", flush=True)
    figures["marks"] = verdicts(figures)

    output = given.output or (HERE.parent / "runs" / "gpu" if given.tiny else HERE / "results")
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "gpu.csv", figures, chosen)
    show(figures)
    print(json.dumps(figures))
    sys.exit(any("error" in figures[name] for name in chosen))


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of a stage."""
    stage, environment = STAGES[name], dict(os.environ)
    command = [sys.executable, str(HERE / stage.program), *stage.arguments]
    if name == "fit24":
        command += ["--layers", str(given.layers), "--moments", given.moments, "--contestants", *given.contestants]
    if given.tiny:
        command.append("--tiny")
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # Tensors are tiny: threads would wait for one another longer than they work.
        environment["OMP_NUM_THREADS"] = "1"
        if stage.interpreted:
            environment["TRITON_INTERPRET"] = "1"
    return gpu_process.run(command, timeout=SECONDS, environment=environment)


def show(figures: dict[str, Any]) -> None:
    """A table for people of what has to be reached."""
    table = Table("figure", "", "target", "", title=f"{figures['card']}{', tiny' if figures['tiny'] else ''}")
    for mark in MARKS:
        found = figures["marks"][mark.name]
        value = "" if found["value"] is None else f"{found['value']:.3g}"
        table.add_row(mark.name, value, f"{mark.sign} {mark.limit:g}", found["verdict"])
    Console(width=120).print(table)


def flat(figures: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure with the names of what it is in before its own, divided by dots; lists are one."""
    if not isinstance(figures, dict):
        yield name, " ".join(map(str, figures)) if isinstance(figures, list) else figures
        return
    for key, value in figures.items():
        yield from flat(value, f"{name}.{key}" if name else key)


def write_csv(path: Path, figures: dict[str, Any], stages: Sequence[str]) -> None:
    """A line for each figure of these stages, in the place of what the same card had of it; other lines stay."""
    about = {name: figures[name] for name in ("card", "driver", "python", "torch", "triton", "tiny")}
    columns = ["stage", "figure", "value", *about]
    # Of what a stage found, the parts that another run has left out stay, such as contestants; its failure does not.
    new = {(about["card"], stage, name) for stage in stages for name in (*figures[stage], "error")}
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            kept = [one for one in lines if (one["card"], one["stage"], one["figure"].partition(".")[0]) not in new]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        for stage in stages:
            for name, value in flat(figures[stage]):
                writer.writerow({"stage": stage, "figure": name, "value": value, **about})


if __name__ == "__main__":
    main()
