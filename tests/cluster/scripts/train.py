"""A training script that knows nothing of MEFT and little of ranks; what each rank saw goes to a folder.

Started anywhere and by whatever launcher: the global batch of a step is the same, each rank takes its share.
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path

import deepspeed
import torch

from tests.families import tiny_llama
from tests.integration.engines import batch, lm_loss

# An all_reduce over shared memory takes minutes to compile.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

GLOBAL_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--configs", type=Path, nargs="+", required=True, help="one training after the other")
    parser.add_argument("--folder", type=Path, required=True, help="<config>.rank<N>.json go here")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between steps")
    parser.add_argument("--checkpoints", type=Path, help="go on from the last one in it, if there is one")
    parser.add_argument("--save_every", type=int, default=0, help="steps")
    args = parser.parse_args()

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    for config in args.configs:
        train(config, args)
    torch.distributed.destroy_process_group()


def train(file: Path, args: argparse.Namespace) -> None:
    """Build the engine of a configuration, train it, and write down every step."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {**json.loads(file.read_text()), "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks}
    model = tiny_llama()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if args.checkpoints is not None and (args.checkpoints / "latest").exists():
        engine.load_checkpoint(str(args.checkpoints))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen = {
        "rank": rank,
        "host": socket.gethostname(),
        "engine": type(engine).__name__,
        "variables": {name: os.environ.get(name) for name in names},
        "first_step": engine.global_steps,
        "losses": [],
    }
    result = args.folder / f"{file.stem}.rank{rank}.json"
    while engine.global_steps < args.steps:
        ids = batch(seed=engine.global_steps % 2, size=GLOBAL_BATCH).chunk(ranks)[rank]
        loss = lm_loss(engine, ids)
        engine.backward(loss)
        engine.step()
        seen["losses"].append(loss.item())
        if args.save_every and engine.global_steps % args.save_every == 0:
            engine.save_checkpoint(str(args.checkpoints))
        # Whole at any time, for those who watch.
        result.with_suffix(".part").write_text(json.dumps(seen))
        result.with_suffix(".part").replace(result)
        time.sleep(args.pause)


if __name__ == "__main__":
    main()
