"""One rank that trains and saves until it is stopped: ``python -m tests.ranks.victim CHECKPOINTS STAGE TIMEOUT``.

It goes on from the newest checkpoint, and prints what it does.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from tests.ranks import member
from tests.ranks.cases import Case, loss_of, sentences

EVERY = 3
"""Steps between two saves."""


def main(folder: Path, stage: int, timeout: float) -> None:
    """Train for ever."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case("victim", stage=stage, sections={"communication": {"timeout": timeout}})
    engine = member.start(case, rank)
    if (folder / "latest").is_file():
        engine.load_checkpoint(str(folder))
        print(f"resumed at {engine.global_steps}", flush=True)
    while True:
        loss = loss_of(engine, *sentences(case, engine.global_steps, 0, rank, size))
        engine.backward(loss)
        engine.step()
        print(f"step {engine.global_steps}", flush=True)
        if engine.global_steps % EVERY == 0:
            engine.save_checkpoint(str(folder))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    # What an all_reduce over shared memory leaves in /dev/shm, only where a test is about that.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = "MEFT_TEST_SHM" in os.environ
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
