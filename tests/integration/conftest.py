"""One process, one rank, no GPU: what DeepSpeed needs to run in a test."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.process_groups import free_port

# Before DeepSpeed is imported: it reads them at import or when it joins the process group.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT=str(free_port()),
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    LOCAL_SIZE="1",
)


@pytest.fixture(scope="session", autouse=True)
def _deepspeed() -> Iterator[None]:
    """Joins the process group once, and leaves it; the models are so tiny that more threads only cost time."""
    import deepspeed
    from deepspeed.utils import logger

    # An all_reduce over shared memory takes minutes to compile, and one rank never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
