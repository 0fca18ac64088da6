"""Runs several training scripts one after another in one process, since importing the libraries is what takes time.

Usage: run_several.py JOBS.json, which holds a list of [script, arguments...].
"""

import json
import os
import runpy
import sys

import deepspeed
import torch
from accelerate.state import AcceleratorState

if __name__ == "__main__":
    torch.set_num_threads(1)
    # An all_reduce over shared memory takes minutes to compile, and one rank never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The launcher appends --local_rank to what it starts.
    path = next(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    with open(path) as file:
        jobs = json.load(file)
    for script, *arguments in jobs:
        sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        # accelerate keeps the first script's DeepSpeed configuration for the whole process.
        AcceleratorState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
