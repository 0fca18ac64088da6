"""What the configurations in ds_configs/ promise, and what they need by the formulas of ``meft_engine.planner``.

``python -m tests.config_sizes`` prints the table that ``ds_configs/README.md`` shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_engine.config import MeftConfig, find_block
from meft_engine.planner import (
    ModelShape,
    Plan,
    base_bytes_needed,
    device_bytes_needed,
    host_bytes_needed,
    plan_run,
)
from meft_engine.planner.memory import CONTEXT_BYTES
from meft_engine.planner.rows import most_active_rows

FOLDER = Path(__file__).parents[1] / "ds_configs"
GIB = 1 << 30

LLAMA_2_7B = ModelShape(layers=32, width=4096, intermediate=11008, vocabulary=32000, parameters=6_738_415_616)
LLAMA_3_8B = ModelShape(layers=32, width=4096, intermediate=14336, vocabulary=128256, parameters=8_030_261_248)
QWEN3_8B = ModelShape(layers=36, width=4096, intermediate=12288, vocabulary=151936, parameters=8_190_735_360)

ALLOCATABLE = {24: 23.0, 40: 38.5, 48: 46.0}
"""GiB of a card, by its name, that are left once driver and CUDA have taken theirs. Of a card whose error correction
takes a sixteenth (A10, L4, L40S) there are 22.5 of 24 or 45 of 48 to begin with."""

PROCESS_GIB = 6
"""For the system and, where one process trains, for Python, PyTorch and CUDA; ``2`` more for each further process."""

STAGE_3_LIVE = 2 * 1_000_000_000
"""Bytes in bf16 of DeepSpeed's default ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class Promise:
    """What a configuration is for."""

    card: int
    """GB of each device, by its name."""
    memory: int
    """GB of each host."""
    models: tuple[ModelShape, ...] = (LLAMA_3_8B, QWEN3_8B)
    length: int = 256
    """Tokens of a sequence."""
    ranks_of_node: int = 1
    nodes: int = 1


PROMISES = {
    "meft_24gb": Promise(24, 64),
    "meft_48gb": Promise(48, 128, length=512),
    "meft_2x24gb_zero3": Promise(24, 128, ranks_of_node=2),
    "meft_multi_node": Promise(40, 256, ranks_of_node=8, nodes=2),
    "meft_24gb_int8_keys": Promise(24, 128),
    "meft_24gb_dense_equivalent": Promise(24, 64),
    "meft_24gb_host_keys": Promise(24, 192),
    "meft_paper_7b": Promise(24, 64, models=(LLAMA_2_7B,)),
}
"""Of every file but that of the demo, which takes what there is."""


def read(name: str) -> dict[str, Any]:
    """A configuration."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Needs:
    """Bytes on each device, and on each host for all of its ranks."""

    device: int
    rows: int
    """Masters, moments, steps and compute copies; with room for copies during saves in the background."""
    gradients: int
    """Of the rows that an accumulation window can touch, in fp32, each rank's own."""
    base: int
    """The base, which every process has in its host's memory while it loads it."""

    @property
    def host(self) -> int:
        """All that a host holds at once, at the worst."""
        return self.rows + self.gradients + self.base


def needs(config: dict[str, Any], model: ModelShape, promise: Promise) -> Needs:
    """By the formulas of the planner, without activation checkpointing."""
    block = find_block(config)
    assert isinstance(block, MeftConfig)
    here = promise.ranks_of_node
    tokens = config["train_micro_batch_size_per_gpu"] * promise.length
    device = device_bytes_needed(block, model.layers, model.width, tokens, compute_dtype=torch.bfloat16)
    stage_3 = config["zero_optimization"]["stage"] == 3
    base = base_bytes_needed(model, tokens, keeps_inputs=stage_3)
    of_base = base["base"]
    if stage_3:
        of_base = of_base // (here * promise.nodes) + STAGE_3_LIVE
    rows = host_bytes_needed(
        block,
        model.layers,
        model.width,
        compute_dtype=torch.bfloat16,
        trainable=True,
        ranks=here * promise.nodes,
        ranks_of_node=here,
    )
    if block.checkpoint.async_save and block.checkpoint.snapshot_bytes:
        rows += here * block.checkpoint.snapshot_bytes
    touched = min(block.adapter.rows, config["gradient_accumulation_steps"] * most_active_rows(block, tokens))
    return Needs(
        device=sum(device.values()) + of_base + base["activations"],
        rows=rows,
        gradients=here * model.layers * 2 * touched * model.width * 4,
        base=here * base["base"],
    )


def fits(found: Needs, promise: Promise) -> bool:
    """Whether devices and hosts of the promised sizes hold it, in decimal GB of the host, which are the fewer."""
    processes = (PROCESS_GIB + 2 * (promise.ranks_of_node - 1)) * GIB
    return found.device <= ALLOCATABLE[promise.card] * GIB and found.host + processes <= promise.memory * 10**9


def plan(name: str, model: Any, promise: Promise) -> Plan:
    """What ``meft-engine plan`` says of a file on the machine that it is for.

    Args:
        model: a shape, or a transformers configuration, which is run without memory.
    """
    return plan_run(
        read(name),
        model,
        gpus=promise.ranks_of_node,
        nodes=promise.nodes,
        sequence_length=promise.length,
        device="cuda",
        device_memory=int(ALLOCATABLE[promise.card] * GIB) + CONTEXT_BYTES,
        host_memory=promise.memory * 10**9 - 4 * GIB,
    )


def table() -> str:
    """What every configuration needs; two figures are those of Llama-3.1-8B and of Qwen3-8B."""
    lines = [
        "| file | adapter, G parameters | each device | host: rows, moments | host: gradients | host: base, loading |",
        "|---|---|---|---|---|---|",
    ]
    for name, promise in PROMISES.items():
        config = read(name)
        block = find_block(config)
        found = [needs(config, model, promise) for model in promise.models]
        sizes = [2 * block.adapter.rows * model.width * model.layers / 1e9 for model in promise.models]
        cells = [
            [f"{size:.1f}" for size in sizes],
            [f"{need.device / GIB:.1f}" for need in found],
            *([f"{getattr(need, part) / GIB:.0f}" for need in found] for part in ("rows", "gradients", "base")),
        ]
        lines.append(f"| `{name}` | {' | '.join(' / '.join(cell) for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    for name, promise in PROMISES.items():
        for model in promise.models:
            print(name, model.layers, fits(needs(read(name), model, promise), promise))
