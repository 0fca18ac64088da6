"""Worlds of several processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.process_groups import free_port
from tests.ranks.cases import Case

ROOT = Path(__file__).parents[2]


def start_world(folder: Path, ranks: int, arguments: list[str], **environment: str) -> list[subprocess.Popen]:
    """Start ``python arguments…`` once for each rank; output goes to ``<folder>/<rank>.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    found = []
    for rank in range(ranks):
        own = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            **environment,
        }
        with (folder / f"{rank}.log").open("w") as log:
            found.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=own,
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return found


def end_world(world: list[subprocess.Popen]) -> None:
    """Whatever has happened, none is left."""
    for process in world:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_world(folder: Path, world: list[subprocess.Popen], timeout: float) -> None:
    """Wait until all ranks have ended well."""
    end = time.monotonic() + timeout
    try:
        for rank, process in enumerate(world):
            code = process.wait(timeout=max(0.1, end - time.monotonic()))
            assert code == 0, f"rank {rank} ended with {code}: {(folder / f'{rank}.log').read_text()[-4000:]}"
    finally:
        end_world(world)


def run_cases(
    folder: Path, ranks: int, cases: list[Case], timeout: float = 900, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Run all cases in one world; of each, what every rank found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([case.as_dict() for case in cases]))
    world = start_world(folder, ranks, ["-m", "tests.ranks.member", str(folder)], **environment)
    wait_for_world(folder, world, timeout)
    return {
        case.name: [torch.load(folder / f"{case.name}.{rank}.pt", map_location="cpu") for rank in range(ranks)]
        for case in cases
    }
