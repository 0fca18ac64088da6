"""One rank that saves, or goes on from a checkpoint of so many rows: ``… resized FOLDER WHAT ROWS CHECKPOINT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.integration.engines import router_state
from tests.ranks import member
from tests.ranks.cases import Case, loss_of, sentences

STEPS = 3


def run(rank: int, size: int, what: str, rows: int, checkpoint: Path) -> dict[str, Any]:
    """``save``: train and save. ``resume``: load, tell what there is, and train on."""
    case = Case("resized", stage=2, bf16=True, adapter={"rows": rows, "num_experts": 12, "center_inputs": True})
    engine = member.start(case, rank)
    torch.manual_seed(1000 + rank)
    found: dict[str, Any] = {"losses": []}

    def train() -> None:
        for step in range(STEPS):
            loss = loss_of(engine, *sentences(case, step, 0, rank, size))
            engine.backward(loss)
            engine.step()
            found["losses"].append(loss.item())

    if what == "save":
        train()
        engine.save_checkpoint(str(checkpoint))
    else:
        engine.load_checkpoint(str(checkpoint))
    engine.synchronize_rows()
    found["rows"], found["moments"] = member.rows_and_state(engine)
    found["routers"] = router_state(engine)
    found["drawn"] = float(torch.rand(()))
    if what == "resume":
        train()
        engine.synchronize_rows()
        found["later"] = member.rows_and_state(engine)[1]
    engine.destroy()
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    folder, what, rows, checkpoint = sys.argv[1:]
    result = run(dist.get_rank(), dist.get_world_size(), what, int(rows), Path(checkpoint))
    torch.save(result, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
