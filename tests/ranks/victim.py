"""One rank that trains and saves: ``python -m tests.ranks.victim CHECKPOINTS STAGE TIMEOUT [STEPS] [MESSAGE]``.

It goes on from the newest checkpoint, and prints what it does; until it is stopped, or for some steps. Rank 1 then ends
with an exception, if there is a message for it; the others do nothing to end well.
"""

from __future__ import annotations

import logging
import math
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


def main(folder: Path, stage: int, timeout: float, steps: float = math.inf, message: str = "") -> None:
    """Train for so many steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case("victim", stage=stage, sections={"communication": {"timeout": timeout}})
    engine = member.start(case, rank)
    if (folder / "latest").is_file():
        engine.load_checkpoint(str(folder))
        print(f"resumed at {engine.global_steps}", flush=True)
    while engine.global_steps < steps or (message and rank != 1):
        loss = loss_of(engine, *sentences(case, engine.global_steps, 0, rank, size))
        engine.backward(loss)
        engine.step()
        print(f"step {engine.global_steps}", flush=True)
        if engine.global_steps % EVERY == 0:
            engine.save_checkpoint(str(folder))
    if message:
        raise ValueError(message)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    # What an all_reduce over shared memory leaves in /dev/shm, only where a test is about that.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = "MEFT_TEST_SHM" in os.environ
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *map(float, sys.argv[4:5]), *sys.argv[5:])
    dist.destroy_process_group()
