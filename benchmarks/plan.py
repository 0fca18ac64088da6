"""What `meft-engine plan` says of six runs beforehand, beside what they take.

Each run has a process of its own, and one more in which a device is played, whose account is held against the plan by
kind. Writes a CSV; the last line is one JSON object. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from meft_engine.cores import rank_cores
from meft_engine.planner import Plan, plan_run
from meft_engine.planner.measure import Speeds, find_speeds

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "launch"))

TARGETS = {"host_rows": 0.05, "host_peak": 0.05, "device": 0.05, "step": 0.30}
"""How far a prediction may be from what is measured, as a part of the latter."""
MEASURED = ("tflops", "host_gbps", "pass_gbps")
READY = "ready for a step"
ROWS = ("compute_copies", "lower_planes", "moments", "steps")


@dataclass(frozen=True)
class Case:
    """A run."""

    name: str
    model: str
    """``smollm2``, or ``llama``: random weights, 12 layers, 768 wide."""
    sequences: int
    length: int
    meft: dict[str, Any]
    accumulation: int = 1
    bf16: bool = False
    stage: int = 0
    checkpointing: bool = False

    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        return {
            "train_micro_batch_size_per_gpu": self.sequences,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": {"enabled": self.bf16},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage},
            "steps_per_print": 10**9,
            "meft": self.meft,
        }


CASES = [
    Case("fp32, lazy", "smollm2", 8, 64, {"adapter": {"rows": 4096}}),
    Case(
        "bf16 rows and moments, dense_equivalent, two micro-batches",
        "smollm2",
        4,
        64,
        {
            "adapter": {"rows": 8192},
            "offload": {"compute_dtype": "bf16"},
            "optimizer": {"moments_dtype": "bf16", "mode": "dense_equivalent"},
        },
        accumulation=2,
    ),
    Case(
        "gradient checkpointing, a cap",
        "smollm2",
        2,
        256,
        {"adapter": {"rows": 2048}, "active_rows": {"cap": 1024}},
        checkpointing=True,
    ),
    Case(
        "bf16 base, ZeRO 2, some layers",
        "llama",
        4,
        128,
        {"adapter": {"rows": 8192, "layers_to_transform": "2-9"}},
        bf16=True,
        stage=2,
    ),
    Case("ZeRO 3", "llama", 4, 128, {"adapter": {"rows": 4096}}, bf16=True, stage=3),
    # Of which nothing was known when the planner's factors were set.
    Case("held out: bf16 base, many rows", "smollm2", 4, 96, {"adapter": {"rows": 16384}}, bf16=True, stage=1),
]
TINY = [
    Case("tiny", "tiny", 2, 16, {"adapter": {"rows": 256, "experts_per_token": 2, "top_k": 4}}),
]


@dataclass
class Compared:
    """What was said of a run and what it took."""

    case: Case
    said: dict[str, float]
    took: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)

    def off(self, figure: str) -> float:
        """By what part of what it took, above or below."""
        return self.said[figure] / self.took[figure] - 1


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs: one tiny model, two steps")
    parser.add_argument("--only", type=int, nargs="*", help="cases by number, from 0")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(rank_cores()))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases, steps = (TINY, 2) if arguments.quick else (CASES, arguments.steps)
    cases = [case for number, case in enumerate(cases) if number in (arguments.only or range(len(cases)))]
    out = arguments.out or (HERE.parent / "runs" / "plan" if arguments.quick else HERE / "results")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = [compare(case, Path(folder), steps, arguments.threads) for case in tqdm(cases, unit="case")]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "plan.csv", found)
    (out / "plan_machine.txt").write_text("\n".join(describe(arguments.threads)) + "\n", encoding="utf-8")
    show(found)
    print(json.dumps(figures_of(found)))


def compare(case: Case, folder: Path, steps: int, threads: int) -> Compared:
    """Plan a run, and run it."""
    model = model_folder(case.model, folder)
    options = {
        "sequence_length": case.length,
        "gradient_checkpointing": case.checkpointing,
        "host_memory": 1 << 50,
    }
    first = plan_run(case.config(), model, device="cpu", **options)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    found: list[Speeds] = []

    def look() -> None:
        found.append(find_speeds(first.trace.products, dtype))

    took = _run(case, model, steps, threads, "host", look)
    speeds = find_speeds((), dtype, **{name: float(np.median([getattr(s, name) for s in found])) for name in MEASURED})
    on_host = plan_run(case.config(), model, device="cpu", speeds=speeds, **options)
    there = plan_run(case.config(), model, device="cuda", device_memory=1 << 50, **options)
    device = _run(case, model, 0, threads, "device", lambda: None)
    said = said_of(on_host, there, device["by_kind"])
    facts = {
        "touched_said": round(on_host.touched_share, 4),
        "touched": round(took["touched_share"], 4),
        "tflops": round(speeds.tflops, 4),
        "host_gbps": round(speeds.host_gbps, 2),
        "pass_gbps": round(speeds.pass_gbps, 2),
        "phases_ms": took["phases_ms"],
        "parts_said_ms": {name: round(value * 1e3, 1) for name, value in on_host.step.parts.items() if value},
        "kinds_off": [kind for kind, count in device["by_kind"].items() if there.device[kind] != count],
    }
    figures = {"host_rows": took["host_rows"], "host_peak": took["host_peak"], "step": took["step"]}
    return Compared(case, said, {**figures, "device": sum(device["by_kind"].values())}, facts)


def said_of(on_host: Plan, there: Plan, kinds: Sequence[str]) -> dict[str, float]:
    """What is compared, of a plan for a CPU and one for a device."""
    return {
        "host_rows": sum(on_host.host[kind] for kind in ROWS),
        "host_peak": on_host.host_of_rank,
        "device": sum(there.device[kind] for kind in kinds),
        "step": on_host.step.seconds,
    }


def model_folder(name: str, folder: Path) -> str:
    """Where a model is; one of random weights is written there first."""
    if name == "smollm2":
        from model_zoo import smollm2

        return str(smollm2())
    place = folder / name
    if not place.is_dir():
        from transformers import LlamaConfig, LlamaForCausalLM

        wide, layers, vocabulary = (768, 12, 32000) if name == "llama" else (64, 2, 500)
        config = LlamaConfig(
            hidden_size=wide,
            intermediate_size=4 * wide,
            num_hidden_layers=layers,
            num_attention_heads=wide // 64,
            vocab_size=vocabulary,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(place)
    return str(place)


def _run(case: Case, model: str, steps: int, threads: int, place: str, look: Callable[[], None]) -> dict[str, Any]:
    """What a process says that trains it; before each of its steps, while it waits, ``look`` is called."""
    number = next(i for i, one in enumerate([*CASES, *TINY]) if one == case)
    command = [sys.executable, str(HERE / "plan_contestant.py"), str(number), model, str(steps), place]
    root = str(HERE.parent)
    paths = os.pathsep.join([root, str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, cwd=root, stderr=errors, **pipes)
        for line in process.stdout:
            if line.strip() == READY:
                look()
                process.stdin.write("\n")
                process.stdin.flush()
        if process.wait():
            errors.seek(0)
            raise SystemExit(f"{case.name} failed:\n{errors.read()[-3000:]}")
    return json.loads(line)


def figures_of(found: Sequence[Compared]) -> dict[str, Any]:
    """For the last line: how far each figure is off in each case, and the worst."""
    listed = {one.case.name: {name: round(one.off(name), 4) for name in TARGETS} for one in found}
    worst = {name: max((abs(one.off(name)) for one in found), default=0.0) for name in TARGETS}
    return {
        "off": listed,
        **{f"worst_{name}": round(value, 4) for name, value in worst.items()},
        "missed": [name for name, value in worst.items() if value > TARGETS[name]],
    }


def write_csv(path: Path, found: Sequence[Compared]) -> None:
    """A line for each figure of each case."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "figure", "predicted", "measured", "off", "target", "facts"])
        for one in found:
            for name, target in TARGETS.items():
                values = f"{one.said[name]:.6g}", f"{one.took[name]:.6g}", f"{one.off(name):+.4f}", target
                writer.writerow([one.case.name, name, *values, json.dumps(one.facts)])


def show(found: Sequence[Compared]) -> None:
    """A table for people."""
    table = Table("case", "figure", "predicted", "measured", "off", "", title="the plan and the run")
    for one in found:
        for name, target in TARGETS.items():
            scale, unit = (1, "s") if name == "step" else (1 << 20, "MiB")
            values = (f"{value / scale:,.2f} {unit}" for value in (one.said[name], one.took[name]))
            reached = "reached" if abs(one.off(name)) <= target else "missed"
            table.add_row(one.case.name, name.replace("_", " "), *values, f"{one.off(name):+.1%}", reached)
    Console(width=140).print(table)


if __name__ == "__main__":
    if psutil.cpu_percent(interval=0.5) > 20:
        print("WARNING: other work keeps the cores busy; seconds are not to be trusted", file=sys.stderr)
    main()
