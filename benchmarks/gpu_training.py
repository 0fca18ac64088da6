"""A model of seven billion parameters on a card of 24 GB: MEFT beside the frozen base, LoRA and ZeRO-Offload.

A stage of ``gpu.py``: prints a line for each contestant, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_process
import psutil
from gpu_contestant import Contestant
from gpu_marks import WHOLE_LAYERS, model_seconds

HERE = Path(__file__).resolve().parent
# In the order in which they are worth their time.
PLAN = {
    "base": Contestant("base"),
    "meft": Contestant("meft", capped=True),
    "zero_offload": Contestant("dense"),
    "meft_stale": Contestant("meft", (32,), max_staleness=1, capped=True),
    "lora": Contestant("lora", capped=True),
    # To show whether it fits; its first step tells.
    "zero_offload_24gb": Contestant("dense", (8,), steps=1, capped=True),
}
SECONDS = 570
"""For all of them together."""


def plan(names: Sequence[str], layers: int, moments: str, tiny: bool) -> dict[str, Contestant]:
    """The contestants of these names; ``tiny`` ones have two layers, few micro-batches and no card to be capped."""
    chosen = {name: dataclasses.replace(PLAN[name], layers=layers, moments=moments) for name in PLAN if name in names}
    if not tiny:
        return chosen
    few = {"layers": 2, "steps": 1, "capped": False, "tiny": True}
    return {
        name: dataclasses.replace(one, accumulations=tuple(count // 4 for count in one.accumulations), **few)
        for name, one in chosen.items()
        if name != "zero_offload_24gb"
    }


def refusal(contestant: Contestant, available: int) -> str | None:
    """Why a contestant cannot run with so many bytes of free host memory; ``None`` if it can."""
    needed = contestant.host_bytes()
    if needed <= available:
        return None
    fitting = contestant.layers * available // needed
    return (
        f"{needed / 1e9:.0f} GB of host memory are needed for {contestant.layers} layers, and {available / 1e9:.0f} GB "
        f"are free; --layers {fitting} would fit"
    )


def run(contestant: Contestant, seconds: float) -> dict[str, Any]:
    """What a contestant finds in a process of its own, or why it does not."""
    refused = refusal(contestant, psutil.virtual_memory().available)
    if refused is not None:
        return {"refused": refused}
    if seconds <= 0:
        return {"error": "no time was left"}
    command = [sys.executable, str(HERE / "gpu_contestant.py"), json.dumps(dataclasses.asdict(contestant))]
    return gpu_process.run(command, timeout=seconds, environment=os.environ)


def add_models(found: dict[str, Any], contestants: dict[str, Contestant], speeds: dict[str, float]) -> None:
    """Add to each window of MEFT's its model's seconds, and the share of the model's speed that was reached."""
    of_base = [window["tokens_per_second"] for window in found.get("base", {}).get("windows", {}).values()]
    for name, contestant in contestants.items():
        if contestant.method != "meft" or not of_base:
            continue
        for count, window in found[name].get("windows", {}).items():
            base_seconds = int(count) * contestant.shape.tokens / max(of_base)
            model = model_seconds(base_seconds, window, speeds, contestant.shape.width, contestant.moments)
            if model is not None:
                window |= {"model_seconds": round(model, 5), "over_model": round(model / window["seconds"], 4)}


def sentence(name: str, found: dict[str, Any]) -> str:
    """A contestant for people."""
    for reason in ("refused", "error"):
        if reason in found:
            return f"{name:<18} {reason}: {found[reason]}"
    if "out_of_memory" in found:
        return f"{name:<18} out of memory: {found['said']}"
    speeds = [f"{one['tokens_per_second']:,.0f} tokens/s × {count}" for count, one in found["windows"].items()]
    peak = "" if found["peak_gb"] is None else f"; at most {found['peak_gb']:.1f} GB on the device"
    return f"{name:<18} {', '.join(speeds)}{peak}, {found['host_gb']:.1f} GB on the host"


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers on the CPU")
    given = parser.parse_args()
    began = time.monotonic()
    speeds = gpu_process.run(
        [sys.executable, str(HERE / "gpu_machine.py"), *(["--tiny"] if given.tiny else [])],
        timeout=120,
        environment=os.environ,
    )
    if "error" in speeds:
        sys.exit(f"the speeds of the machine could not be measured: {speeds['error']}")
    contestants = plan(given.contestants, given.layers, given.moments, given.tiny)
    found: dict[str, Any] = {}
    for name, contestant in contestants.items():
        started = time.monotonic()
        found[name] = run(contestant, SECONDS - (started - began))
        found[name]["took_seconds"] = round(time.monotonic() - started, 1)
        print(sentence(name, found[name]), flush=True)
    add_models(found, contestants, speeds)
    layers = 2 if given.tiny else given.layers
    print(json.dumps({"layers": layers, "moments": given.moments, "speeds": speeds, **found}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``gpu.py`` hands on."""
    names = [*PLAN]
    parser.add_argument("--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--layers", type=int, default=WHOLE_LAYERS, help="of the model; fewer take less time, memory")
    parser.add_argument("--moments", choices=["fp32", "bf16"], default="fp32", help="precision of MEFT's moments")


if __name__ == "__main__":
    main()
