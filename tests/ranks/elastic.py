"""One rank of a world that saves, or goes on from what another world saved, with the same sentences in all.

``python -m tests.ranks.elastic FOLDER STAGE MODE BACKGROUND WHAT CHECKPOINT``; results go to ``<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.integration.engines import router_values
from tests.ranks import member
from tests.ranks.cases import SEQUENCES, Case, loss_of, sentences

PARTS, STEPS = 4, 4
"""Of a step's batch, which ranks divide among them; steps before the save, and after it."""


def run(rank: int, size: int, stage: int, mode: str, background: bool, what: str, checkpoint: Path) -> dict[str, Any]:
    """``save``: train some steps and save. ``resume``: load and train as many more. ``through``: train all of them."""
    case = Case(
        "elastic",
        stage=stage,
        mode=mode,
        sections={"checkpoint": {"async_save": background}, "communication": {"timeout": 60.0}},
        adapter={"center_inputs": True},
        top_level={
            "train_micro_batch_size_per_gpu": SEQUENCES * PARTS // size,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 4e-3, "warmup_num_steps": 6}},
        },
    )
    engine = member.start(case, rank)
    first, last = {"save": (0, STEPS), "resume": (STEPS, 2 * STEPS), "through": (0, 2 * STEPS)}[what]
    found: dict[str, Any] = {"losses": []}
    if what == "resume":
        _, client = engine.load_checkpoint(str(checkpoint))
        assert client["note"] == "kept" and engine.global_steps == STEPS
    own = range(rank * PARTS // size, (rank + 1) * PARTS // size)
    for step in range(first, last):
        parts = [sentences(case, step, 0, part, PARTS) for part in own]
        loss = loss_of(engine, *(torch.cat(kind) for kind in zip(*parts, strict=True)))
        engine.backward(loss)
        engine.step()
        found["losses"].append(loss.item())
    if what == "save":
        engine.save_checkpoint(str(checkpoint), client_state={"note": "kept"})
    found["rows"], found["state"] = member.rows_and_state(engine)
    found["routers"] = router_values(engine)
    found["lr"] = engine.get_lr()
    engine.destroy()
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    folder, stage, mode, background, what, checkpoint = sys.argv[1:]
    rank, size = dist.get_rank(), dist.get_world_size()
    found = run(rank, size, int(stage), mode, background == "background", what, Path(checkpoint))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
