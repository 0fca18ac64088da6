"""One rank that saves, resumes or reads: ``python -m tests.ranks.saving FOLDER MODE WHAT CHECKPOINT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import meft_engine
from tests.ranks import member
from tests.ranks.cases import Case, loss_of, model, sentences

STEPS = 4


def run(folder: Path, rank: int, size: int, mode: str, what: str, checkpoint: Path) -> dict[str, Any]:
    """``save``: train, save, train on. ``resume``: load and train on. ``inspect``: load."""
    log = {"interval": 2, "folder": str(folder / "run")}
    case = Case("saving", mode=mode, bf16=True, adapter={"center_inputs": True}, sections={"monitor": log})
    engine = member.start(case, rank)
    torch.manual_seed(1000 + rank)
    found: dict[str, Any] = {"losses": []}

    def train(steps: range) -> None:
        for step in steps:
            loss = loss_of(engine, *sentences(case, step, 0, rank, size))
            engine.backward(loss)
            engine.step()
            found["losses"].append(loss.item())

    if what == "save":
        train(range(STEPS))
        engine.save_checkpoint(str(checkpoint))
    else:
        engine.load_checkpoint(str(checkpoint))
    found["saved_rows"], found["saved_moments"] = member.rows_and_state(engine)
    found["plain_loss"] = plain_loss(case, checkpoint)
    if what != "inspect":
        if what == "save":
            engine.load_checkpoint(str(checkpoint))
        train(range(STEPS, 2 * STEPS))
        found["drawn"] = float(torch.rand(()))
        rows, moments = member.rows_and_state(engine)
        found["state"] = {name: value for name, (_, value) in (rows | moments).items()}
    engine.destroy()
    return found


def plain_loss(case: Case, checkpoint: Path) -> float:
    """Of a transformers model with the checkpoint's adapter."""
    plain = meft_engine.load_adapter(model().eval(), checkpoint)
    with torch.no_grad():
        return float(loss_of(plain, *sentences(case, 99, 0, 0, 1)))


def whole(parts: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """What the ranks own, put together."""
    return member.whole([part[kind] for part in parts])


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    folder, mode, what, checkpoint = sys.argv[1:]
    result = run(Path(folder), dist.get_rank(), dist.get_world_size(), mode, what, Path(checkpoint))
    torch.save(result, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
