"""One rank that trains, and hands over what trains beside the rows: ``python -m tests.ranks.parameters FOLDER``.

The folder holds ``legs.json``; what each rank found goes to ``<leg>.<rank>.pt``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from meft_engine.checkpoint import parameter_state
from tests.families import ODD_WIDTH
from tests.integration.engines import batch, train_step
from tests.integration.parameters import compute_copies, make_engine, take_over
from tests.ranks import member

STEPS, SENTENCES = 3, 6
"""Of a leg; of a step, over all ranks."""


@dataclass
class Leg:
    """A part of a run: what goes on, in which engine, and where it is left."""

    name: str
    stage: int
    start: int = 0
    """Its first step."""
    load: str | None = None
    """The folder that it takes over from."""
    save: str | None = None
    gate: str = "softmax"
    bf16: bool = False
    steps: int = STEPS
    trained_before: bool = False
    """Whether it takes over in an engine that has trained something else, and has small parameters whole."""


def run(leg: Leg, rank: int, size: int) -> dict[str, Any]:
    """What a leg came to: rows of this rank, and the parameters of all, in rank 0."""
    # Whatever is divided by two has a part that is padded.
    engine = make_engine(
        lora=leg.gate == "softmax",
        block={"rows": 110, "num_experts": 11, "gate": leg.gate},
        shape=ODD_WIDTH,
        stage=leg.stage,
        bf16=leg.bf16,
        zero={"stage3_param_persistence_threshold": 100_000} if leg.trained_before else None,
        train_micro_batch_size_per_gpu=SENTENCES // size,
    )

    def train(start: int, steps: int) -> list[float]:
        batches = [batch(100 + step, size=SENTENCES, length=8) for step in range(start, start + steps)]
        return [train_step(engine, [sentences.chunk(size)[rank]]) for sentences in batches]

    if leg.trained_before:
        train(50, 1)
    if leg.load is not None:
        take_over(engine, Path(leg.load, "middle"), torch.load(Path(leg.load, "parameters.pt")))
    losses = train(leg.start, leg.steps)
    if leg.save is not None:
        engine.save_checkpoint(leg.save, tag="middle", client_state={"epoch": 3})
        tensors = parameter_state.capture(engine)
        if rank == 0:
            torch.save(tensors, Path(leg.save, "parameters.pt"))
        engine.ranks.barrier()
    rows, moments = member.rows_and_state(engine)
    found = {
        "losses": losses,
        "rows": rows | moments,
        "parameters": parameter_state.capture(engine),
        "compute": compute_copies(engine),
        "progress": (engine.global_steps, engine.global_samples, engine.get_lr()),
    }
    engine.destroy()
    return found


def write(legs: list[Leg], folder: Path) -> None:
    """For another world."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "legs.json").write_text(json.dumps([asdict(leg) for leg in legs]))


def main(folder: Path) -> None:
    """Run all legs in one process group."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    for line in json.loads((folder / "legs.json").read_text()):
        leg = Leg(**line)
        torch.save(run(leg, rank, size), folder / f"{leg.name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
