"""Prints how an engine refuses rows that do not fit into the address space that the process may use.

A program of its own, since the limit stays with the process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time

import psutil

from tests.process_groups import free_port

ROWS = 1 << 20


def main() -> None:
    """Eight GiB of addresses beside what is taken before the engine is built."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu", **alone)
    import deepspeed

    import meft_engine
    from meft_engine.config import MeftConfigError
    from tests.families import tiny_llama

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = tiny_llama(num_hidden_layers=2, hidden_size=256)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 30), resource.RLIM_INFINITY))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "meft": {"adapter": {"rows": ROWS}},
    }
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    try:
        meft_engine.initialize(model=model, config=config)
    except MeftConfigError as error:
        message = str(error)
    seconds, grown = time.perf_counter() - began, psutil.Process().memory_info().rss - before
    fitting = int(re.search(r"at most about (\d+) rows", message)[1])
    print(json.dumps({"message": message, "seconds": seconds, "grown": grown, "fitting": fitting}))


if __name__ == "__main__":
    main()
