"""The whole path on a real model, from nothing: fetch, ask, train through the DeepSpeed launcher, ask again.

A 135 M model is asked 256 questions that it cannot answer, learns the answers with a MEFT adapter, and is asked again,
in the words that it was trained on and in others. The last line printed is one JSON object with the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launcher
import torch
from data import DataError
from inference import native_bf16
from launcher import HERE, deepspeed_command, free_port, remove_buffers, script
from rich.console import Console
from rich.table import Table

from meft_engine import run_log

CONSOLE = Console()
RESULT_KEYS = ("touched_share", "kept_mass", "device_bytes", "dense_device_bytes", "host_bytes")


class StepFailed(RuntimeError):
    """A step of the demo ended with an error; it has printed its own reason."""


def environment() -> dict[str, str]:
    """What the sub-processes need: the CPU where there is no GPU, and no hub, since the model is on disk."""
    values = launcher.environment(cpu=not torch.cuda.is_available())
    values.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    values["HF_HUB_OFFLINE"] = "1"
    return values


def run(title: str, command: list[str]) -> str:
    """Run one step with its output shown as it comes, and return the last line that it printed.

    Raises:
        StepFailed: when it ends with an error.
    """
    CONSOLE.rule(f"[bold]{title}", align="left")
    last = ""
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise StepFailed(f"{title}: the step ended with exit code {process.returncode}; its reason stands above")
    return last


def training_command(model: str, facts: Path, adapter: Path, port: int, args: argparse.Namespace) -> list[str]:
    """``deepspeed launch/finetune.py …`` for one process on this machine."""
    command = deepspeed_command("--num_accelerators", "1", "--master_port", str(port), str(HERE / "finetune.py"))
    options = {
        "model_name_or_path": model,
        "train_file": facts / "train.jsonl",
        "output_dir": adapter,
        "deepspeed": args.config,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "max_length": 64,
        "lr_scheduler_type": "linear",
        "warmup_steps": 8,
        "optim": "adamw_torch",
        "logging_steps": 8,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if native_bf16():
        command.append("--bf16")
    if not torch.cuda.is_available():
        command.append("--use_cpu")
    return command


def result_of(before: Mapping[str, Any], after: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's result, which is also its last line."""
    return {
        "em_before": before["trained"]["exact_match"],
        "em_trained": after["trained"]["exact_match"],
        "em_second_wording": after["second_wording"]["exact_match"],
        **{key: report[key] for key in RESULT_KEYS},
        "seconds_per_step": report["seconds_per_step"],
        "steps": report["steps"],
    }


def show(before: Mapping[str, Any], after: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """The result for people."""

    def mib(count: float) -> str:
        return f"{count / 2**20:,.0f} MiB"

    table = Table(title="What the adapter learned, and what it cost", show_header=False)
    for stem, wording in (("trained", "trained wording"), ("second_wording", "second wording, never trained on")):
        scores = [f"{scored[stem]['exact_match']:.3f}" for scored in (before, after)]
        table.add_row(f"exact match, {wording}", f"{scores[0]} before → {scores[1]} after")
    size, base = report["adapter_parameters"], report["base_parameters"]
    table.add_row("adapter size", f"{size / 1e6:.1f} M parameters ({size / base:.0%} of the base model)")
    table.add_row(
        "rows touched by a micro-batch", f"{report['touched_share']:.1%} (kept mass {report['kept_mass']:.3f})"
    )
    table.add_row(
        "resident on the device", f"{mib(report['device_bytes'])} (dense adapter: {mib(report['dense_device_bytes'])})"
    )
    table.add_row(
        "in host memory",
        f"{mib(report['host_bytes'])} counted, {mib(report['host_bytes_measured'])} measured as resident",
    )
    table.add_row("speed", f"{report['seconds_per_step']:.2f} s a step, {report['steps']} steps")
    CONSOLE.print(table)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are what `make demo` runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=HERE.parent / "runs" / "demo", help="folder for facts and adapter"
    )
    parser.add_argument("--config", type=Path, default=HERE.parent / "ds_configs" / "demo_cpu.json")
    parser.add_argument("--model", help="another base model; without it SmolLM2-135M-Instruct is fetched")
    parser.add_argument("--facts", type=int, default=256, help="number of airports")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.25e-3)
    return parser.parse_args(argv)


def main() -> None:
    """Command line, see the top of this file."""
    args = parse_arguments()
    started = time.monotonic()
    facts, adapter = args.output / "facts", args.output / "adapter"
    report_file = adapter / "train_report.json"
    for of_earlier_run in (report_file, adapter / run_log.FILE):
        of_earlier_run.unlink(missing_ok=True)  # it must not pass for this one's
    questions = ["--data", str(facts / "trained.jsonl"), str(facts / "second_wording.jsonl"), "--log", str(adapter)]

    model = args.model or run("1. Fetch the model", script("model_zoo.py"))
    run("2. Write the facts", script("facts.py", "--out", str(facts), "--count", str(args.facts)))
    before = run("3. Ask the base model", script("evaluate.py", "--model", model, *questions))
    port = free_port()
    try:
        run("4. Train the adapter", training_command(model, facts, adapter, port, args))
    finally:
        remove_buffers(port)
    answers = ["--adapter", str(adapter), "--predictions", str(args.output / "answers.jsonl")]
    after = run("5. Ask again", script("evaluate.py", "--model", model, *answers, *questions))

    CONSOLE.rule("[bold]Result", align="left")
    before, after, report = json.loads(before), json.loads(after), json.loads(report_file.read_text(encoding="utf-8"))
    show(before, after, report)
    print(f"Finished in {time.monotonic() - started:.0f} s. Ask it yourself:")
    ask = [
        "launch/generate.py",
        "--model",
        model,
        "--adapter",
        str(adapter),
        "--prompt",
        '"The airport … is in which city?"',
    ]
    print(" ", sys.executable, *ask)
    print(f"See how it went: {sys.executable} -m meft_engine report {adapter}")
    print(json.dumps(result_of(before, after, report)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (StepFailed, DataError) as error:
        sys.exit(str(error))
