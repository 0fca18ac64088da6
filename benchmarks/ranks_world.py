"""Worlds of several processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ranks_cases import Plan

_HERE = Path(__file__).resolve().parent


def run_world(ranks: int, plan: Plan, timeout: float) -> list[dict[str, Any]]:
    """Start a world, and return what each of its ranks found.

    Raises:
        RuntimeError: if a rank fails, with the end of what it printed, or if they take longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="meft-ranks-") as name:
        folder = Path(name)
        plan.write(folder / "plan.json")
        world = [_start(folder, rank, ranks) for rank in range(ranks)]
        try:
            end = time.monotonic() + timeout
            while any(process.poll() is None for process in world) and time.monotonic() < end:
                if any(process.poll() for process in world):
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in world]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                log = (folder / f"{failed}.log").read_text(errors="replace")
                raise RuntimeError(f"rank {failed} of {ranks} ended with {codes[failed]}: {log[-3000:]}")
            if None in codes:
                raise RuntimeError(f"{codes.count(None)} of {ranks} ranks did not end within {timeout:.0f} s")
            return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        finally:
            for process in world:
                process.kill()
            for process in world:
                process.wait()


def _start(folder: Path, rank: int, ranks: int) -> subprocess.Popen:
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
    }
    with (folder / f"{rank}.log").open("w") as log:
        command = [sys.executable, str(_HERE / "ranks_member.py"), str(folder)]
        return subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT)
