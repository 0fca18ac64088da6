"""A training step of SmolLM2-135M beside the frozen base alone: MEFT, a dense adapter under ZeRO-Offload, LoRA.

Each contestant has a process of its own; those that are compared take turns, so that whatever else the machine does is
felt by all. Writes CSVs and a picture; the last line is one JSON object. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from machine import describe, footnote
from rich.console import Console
from rich.table import Table
from step_contestant import Contestant, serve
from step_floor import Machine
from tqdm import tqdm

from meft_engine.cores import rank_cores
from meft_engine.planner.passes import Part, parts

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "launch"))

TARGETS = {
    "meft_over_base_8192": ("<=", 1.30),
    "zero_offload_over_meft_8192": (">=", 3.5),
    "growth_4096_32768": ("<=", 1.15),
    "host_bytes_ratio_8192": ("<=", 0.75),
}
BASE, LORA = Contestant("base"), Contestant("lora")
DEFAULT, DENSE = Contestant("meft", 8192), Contestant("dense", 8192)
WIDE_K = dataclasses.replace(DEFAULT, top_k=64)
# With as many candidates and as many active rows, whatever the number of rows: experts of 64 rows, a cap that binds.
EXPERT_ROWS, CAP = 64, 1024


def growing(rows: int, layers: int = 0) -> Contestant:
    """One of those whose number of rows alone differs."""
    return Contestant("meft", rows, layers, rows // EXPERT_ROWS, cap=CAP)


@dataclass(frozen=True)
class Line:
    """Contestants that take turns, and how many; no more of them than fit into 24 GB side by side."""

    contestants: list[Contestant]
    rounds: int = 1


PLAN: dict[str, Line] = {
    "default": Line([BASE, DEFAULT, LORA], 9),
    "zero offload": Line([DEFAULT, DENSE], 3),
    "K = 64": Line([BASE, WIDE_K], 3),
    "growth": Line([growing(4096), growing(32768)], 9),
    "growth, between": Line([growing(8192), growing(16384)]),
    "growth, ten layers": Line([growing(rows, 10) for rows in (4096, 16384, 65536)], 2),
    "growth, two layers": Line([growing(rows, 2) for rows in (4096, 65536, 262144)], 2),
    "rows": Line([Contestant("meft", rows) for rows in (1024, 2048, 4096, 16384)]),
    "rows, most": Line([Contestant("meft", 32768)]),
    "dense": Line([Contestant("dense", 1024), Contestant("dense", 4096)]),
    "tokens": Line([dataclasses.replace(c, sequences=count) for count in (2, 16) for c in (BASE, DEFAULT)]),
    "touched rows": Line([dataclasses.replace(DEFAULT, cap=cap) for cap in (512, 1024, 2048)]),
}


@dataclass
class Measured:
    """A contestant in one line of the plan."""

    case: str
    contestant: Contestant
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return float(np.median(self.seconds))


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs: few steps of a few contestants")
    parser.add_argument("--only", nargs="*", choices=[*PLAN], help="these lines of the plan alone")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=len(rank_cores()))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or (HERE.parent / "runs" / "step" if arguments.quick else HERE / "results")
    plan, steps = PLAN, arguments.steps
    if arguments.quick:
        plan, steps = {"default": Line([BASE, Contestant("meft", 1024, layers=2)])}, 1
    plan = {case: line for case, line in plan.items() if case in (arguments.only or plan)}

    from model_zoo import smollm2

    model = str(smollm2())
    torch.set_num_threads(arguments.threads)
    machine = Machine.measure()
    found: list[Measured] = []
    with tqdm(total=sum(line.rounds * len(line.contestants) for line in plan.values()), unit="turn") as bar:
        for case, line in plan.items():
            bar.set_description(case)
            for measured in compare(case, line, model, steps, arguments.threads, bar):
                found.append(measured)
                bar.write(sentence(measured), file=sys.stdout)
            machine = machine.at_best(Machine.measure())
    figures = figures_of(found)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "step.csv", found)
    profile = profile_of(found, machine)
    write_profile(out / "step_profile.csv", profile)
    facts = [f"{machine.bytes_per_second / 1e9:.1f} GB/s copied, {machine.flops_per_second / 1e9:.0f} GFLOP/s in fp32"]
    (out / "step_machine.txt").write_text("\n".join(describe(arguments.threads) + facts) + "\n", encoding="utf-8")
    picture(out / "step.png", found, profile, footnote(arguments.threads))
    show(figures)
    print(json.dumps(figures))


def compare(case: str, line: Line, model: str, steps: int, threads: int, bar: Any) -> list[Measured]:
    """Let them take turns."""
    text = tokens(model)
    with ExitStack() as processes:
        pipes = [processes.enter_context(running(c, model, text, threads)) for c in line.contestants]
        measured = [Measured(case, contestant) for contestant in line.contestants]
        for pipe in pipes:
            ask(pipe, "steps", 1)  # compiles, allocates; they start side by side
        for _ in range(line.rounds):
            for pipe, one in zip(pipes, measured, strict=True):
                one.seconds.append(ask(pipe, "steps", steps))
                bar.update()
        for pipe, one in zip(pipes, measured, strict=True):
            one.figures = ask(pipe, "figures")
    return measured


@contextmanager
def running(contestant: Contestant, model: str, text: torch.Tensor, threads: int) -> Iterator[Any]:
    """A process with this contestant, which is still starting; gives the end of its pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = context.Process(target=serve, args=(contestant, model, text, threads, port, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process ends what waits for its answer
    try:
        yield here
        here.send(None)
        process.join(timeout=60)
    finally:
        process.kill()
        process.join()


def ask(pipe: Any, *question: Any) -> Any:
    """What the process answers."""
    pipe.send(question)
    return pipe.recv()


def tokens(model: str) -> torch.Tensor:
    """[n] int64: the fixed text."""
    from transformers import AutoTokenizer

    text = (HERE / "learning" / "text.txt").read_text(encoding="utf-8")
    return torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])


def figures_of(found: Sequence[Measured]) -> dict[str, float | None]:
    """What is held against the targets; ``None`` for what was not measured."""
    by = {(one.case, one.contestant): one for one in found}

    def ratio(case: str, above: Contestant, below: Contestant) -> float | None:
        """The median over rounds, in each of which both have felt the same machine."""
        pair = by.get((case, above)), by.get((case, below))
        return round(float(np.median(np.divide(*(one.seconds for one in pair)))), 4) if all(pair) else None

    def host_ratio(kind: str) -> float | None:
        pairs = (("default", BASE), ("zero offload", DEFAULT), ("zero offload", DENSE))
        base, ours, dense = (by.get(pair) for pair in pairs)
        if not (base and ours and dense):
            return None
        ours, dense = (one.figures[kind] - base.figures[kind] for one in (ours, dense))
        return round(ours / dense, 4)

    return {
        "meft_over_base_8192": ratio("default", DEFAULT, BASE),
        "meft_over_base_8192_k64": ratio("K = 64", WIDE_K, BASE),
        "zero_offload_over_meft_8192": ratio("zero offload", DENSE, DEFAULT),
        "lora_over_base": ratio("default", LORA, BASE),
        "growth_4096_32768": ratio("growth", growing(32768), growing(4096)),
        "growth_10_layers_4096_65536": ratio("growth, ten layers", growing(65536, 10), growing(4096, 10)),
        "growth_2_layers_4096_262144": ratio("growth, two layers", growing(262144, 2), growing(4096, 2)),
        "host_bytes_ratio_8192": host_ratio("counted_bytes"),
        "host_bytes_ratio_8192_resident": host_ratio("resident_bytes"),
    }


def sentence(one: Measured) -> str:
    """A contestant for people."""
    phases = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in one.figures["phases"].items())
    return (
        f"{one.case:<18} {one.contestant.name:<36} {one.contestant.sequences} x {one.contestant.length} tokens "
        f"{one.median * 1e3:8.0f} ms (quartiles {np.quantile(one.seconds, 0.25) * 1e3:.0f} to "
        f"{np.quantile(one.seconds, 0.75) * 1e3:.0f}), {one.figures['counted_bytes'] / 2**20:,.0f} MiB counted, "
        f"touched {one.figures['touched_share']:.1%}" + (f"; ms: {phases}" if phases else "")
    )


def show(figures: dict[str, float | None]) -> None:
    """A table for people."""
    table = Table("figure", "", "target", "", title="a training step")
    for name, value in figures.items():
        sign, limit = TARGETS.get(name, ("", ""))
        reached = "" if not sign or value is None else "reached" if _reached(value, sign, limit) else "missed"
        table.add_row(name, "not measured" if value is None else f"{value:.3g}", f"{sign} {limit}", reached)
    Console(width=120).print(table)


def profile_of(found: Sequence[Measured], machine: Machine) -> list[tuple[Part, float, float]]:
    """Of the default contestant: each part, its seconds, and its floor."""
    one = next((one for one in found if one.contestant == DEFAULT), None)
    if one is None:
        return []
    shape = one.figures["shape"]
    tokens_of_step = DEFAULT.sequences * DEFAULT.length
    listed = parts(tokens=tokens_of_step, touched=one.figures["touched_share"], **shape)
    return [(part, one.figures["phases"].get(part.phase, 0.0), part.floor(machine)) for part in listed]


def write_profile(path: Path, profile: Sequence[tuple[Part, float, float]]) -> None:
    """A line for each part. The measured backward holds that of the frozen model."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["phase", "what", "mib", "gflop", "floor_ms", "measured_ms"])
        for part, seconds, floor in profile:
            sizes = f"{part.moved / 2**20:.1f}", f"{part.flops / 1e9:.2f}", f"{floor * 1e3:.1f}", f"{seconds * 1e3:.1f}"
            writer.writerow([part.phase, part.what, *sizes])


def picture(path: Path, found: Sequence[Measured], profile: Sequence[tuple[Part, float, float]], note: str) -> None:
    """Draw what was measured."""
    from step_plot import draw

    ms = 1e3
    cases = ("dense", "K = 64", "zero offload", "default")  # of one that is in several the last, measured most often
    shown = {one.contestant: one for case in cases for one in found if one.case == case}
    grown = {
        "all layers, touched rows fixed": ("growth", "growth, between"),
        "ten layers, touched rows fixed": ("growth, ten layers",),
        "two layers, touched rows fixed": ("growth, two layers",),
        "all layers, √r experts, touched as may be": ("rows", "rows, most", "zero offload"),
    }

    def by_rows(cases: Sequence[str], value: Callable[[Measured], float]) -> list[tuple[float, float]]:
        lines = [one for one in found if one.case in cases and one.contestant.method == "meft"]
        return [(one.contestant.rows, value(one)) for one in lines]

    everywhere = grown["all layers, √r experts, touched as may be"]
    draw(
        path,
        [(c.name, c.method, one.median * ms) for c, one in sorted(shown.items(), key=lambda item: item[1].median)],
        {name: by_rows(cases, lambda one: one.median * ms) for name, cases in grown.items()},
        {
            "host: rows and moments": by_rows(everywhere, lambda one: one.figures["counted_bytes"] / 2**20),
            "what an accelerator would hold": by_rows(everywhere, lambda one: one.figures["device_bytes"] / 2**20),
        },
        [(part.phase, seconds * ms, floor * ms) for part, seconds, floor in profile if part.phase != "backward"],
        note,
    )


def _reached(value: float, sign: str, limit: float) -> bool:
    return value <= limit if sign == "<=" else value >= limit


def write_csv(path: Path, found: Sequence[Measured]) -> None:
    """One line for each contestant in each line of the plan."""
    names = [item.name for item in dataclasses.fields(Contestant)]
    kinds = ("counted_bytes", "resident_bytes", "device_bytes", "touched_share")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *names, "median_ms", "first_quartile_ms", "third_quartile_ms", *kinds, "phases_ms"])
        for one in found:
            quartiles = [f"{np.quantile(one.seconds, q) * 1e3:.2f}" for q in (0.5, 0.25, 0.75)]
            phases = json.dumps({name: round(seconds * 1e3, 2) for name, seconds in one.figures["phases"].items()})
            settings = dataclasses.astuple(one.contestant)
            writer.writerow([one.case, *settings, *quartiles, *(one.figures[kind] for kind in kinds), phases])


if __name__ == "__main__":
    if psutil.cpu_percent(interval=0.5) > 20:
        print("WARNING: other work keeps the cores busy; seconds are too long", file=sys.stderr)
    main()
