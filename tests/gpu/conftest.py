"""One process, one rank, one GPU; without CUDA everything here is skipped."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.process_groups import free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where DeepSpeed was told to compute on the CPU."""
    here = [item for item in items if item.path.parent.name == "gpu"]
    if not torch.cuda.is_available():
        reason = "no CUDA device here"
    elif os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        reason = "DS_ACCELERATOR names another accelerator than cuda; run tests/gpu in a process of its own"
    else:
        return
    for item in here:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _deepspeed() -> Iterator[None]:
    """Joins the process group once, and leaves it."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
