"""Writes logs of runs as an engine writes them, without one."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from meft_engine import run_log
from meft_engine.config import MeftConfig

LAYERS, ROWS, EXPERTS = 4, 64, 8


def start_of(step: int = 0, **changes: Any) -> dict[str, Any]:
    """A ``start`` record; changes of ``meft`` are those of the block."""
    block = MeftConfig.from_block(
        {"adapter": {"rows": ROWS, "num_experts": EXPERTS, "top_k": 4}, **changes.pop("meft", {})}
    )
    kinds = {"rows": 2**20, "moments": 2**21, "steps": 2**12}
    device = {"routers": 2**14, "keys": 2**19, "slots": 2**18, "gradient_slots": 0, "hot_rows": 0, "gradients": 2**16}
    return {
        "step": step,
        "model": "a model",
        "block": block.resolved(),
        "layers": [f"model.layers.{layer}.mlp" for layer in range(LAYERS)],
        "rows": ROWS,
        "width": 32,
        "adapter_parameters": 12_345_678,
        "base_parameters": 20_000_000,
        "dense_device_bytes": 2**24,
        "compute_dtype": "bfloat16",
        "ranks": 1,
        "nodes": 1,
        "zero_stage": 2,
        "batch": {"micro_batch": 4, "accumulation_steps": 2, "samples_a_step": 8, "most_tokens_of_a_micro_batch": 99},
        "optimizer": {
            "name": "AdamW",
            "lr": 1e-3,
            "betas": [0.9, 0.99],
            "gradient_clipping": 1.0,
            "lr_scheduler": None,
        },
        "device": "a device",
        "versions": {"meft_engine": "0", "torch": "2"},
        "planned": {"host": kinds, "device": device, "ranks_of_node": 1},
        "device_is_host": True,
        **changes,
    }


def write_run(folder: Path, *, steps: int = 6, interval: int = 10, end: bool = True, **changes: Any) -> Path:
    """The log of a run of so many readings.

    Args:
        end: whether it has ended. changes: of its ``start`` record.
    """
    run_log.append(folder, "evaluation", model="a model", adapter=None, results=scores(0.0), step=0)
    run_log.append(folder, "start", **start_of(**changes))
    for reading in range(1, steps + 1):
        write_reading(folder, reading * interval, reading * 1.5)
    step = steps * interval
    load = [[(7 * layer + 3 * expert) % 11 for expert in range(EXPERTS)] for layer in range(LAYERS)]
    run_log.append(
        folder,
        "layers",
        **{"step": step, "since": step - interval, "experts": EXPERTS, "experts_a_bin": 1, "load": load},
        dead=[of_layer.count(0) for of_layer in load],
        touched=[0.1 + 0.2 * layer for layer in range(LAYERS)],
        kept=[1.0, 0.95, 1 / 3, 1.0],
        update_bins=[0, 1, 2, 4],
        updates=[[ROWS - 30, 5, 10, 15]] * LAYERS,
    )
    measured = {"routers": 2**14, "keys": 2**19, "slots": 2**17, "gradient_slots": 0, "hot_rows": 0, "gradients": 0}
    host = {"rows": 2**20, "moments": 2**21, "steps": 2**12}
    run_log.append(folder, "memory", step=step, host=host, device=measured, host_resident=2**30, device_peak=None)
    if end:
        run_log.append(folder, "end", step=step, error=None)
        run_log.append(folder, "evaluation", model="a model", adapter="a", results=scores(0.875), step=step)
        (folder / "train_report.json").write_text(json.dumps({"seconds_per_step": 1.25, "steps": step}))
    return folder


def write_reading(folder: Path, step: int, seconds: float, **figures: float) -> None:
    """A ``step`` record."""
    found = {
        **{"loss": 5 * math.exp(-step / 20), "lr": 1e-3 / step, "grad_norm": 1 / 3, "touched_share": 0.4 - step / 1000},
        **{"kept_mass": 0.99, "dead_experts": 1 / (7 * step), "load_entropy": 0.9},
        **{"bytes_to_device": 2**20 + step, "bytes_to_host": 2**21 + step},
        **{"seconds/forward": 0.3, "seconds/route": 0.1, "seconds/backward": 0.7 / step, "seconds/other": 0.01},
        **figures,
    }
    run_log.append(folder, "step", step=step, samples=8 * step, tokens=100 * step, seconds=seconds, figures=found)


def scores(exact_match: float) -> dict[str, Any]:
    """What ``launch/evaluate.py`` finds of two sets."""
    return {
        name: {"exact_match": exact_match, "f1": exact_match, "count": 40} for name in ("trained", "second_wording")
    }


def set_back(folder: Path, seconds: float) -> None:
    """Let everything in the log be so much longer ago."""
    lines = [json.loads(line) for line in (folder / run_log.FILE).read_text().splitlines()]
    lines = [{**line, "time": time.time() - seconds} for line in lines]
    (folder / run_log.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
