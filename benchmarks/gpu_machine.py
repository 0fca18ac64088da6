"""The card that figures belong to, and what it, its bus and its host do at their best.

Run as a program, it measures that in a process of its own and prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


@dataclass(frozen=True)
class Speeds:
    """Bytes, or operations, a second."""

    memory: float
    """Of a copy in the device's memory, read and written."""
    to_device: float
    to_host: float
    """Of a copy over the bus from or to pinned memory."""
    host: float
    """Of a copy in the host's memory, read and written, on all cores that torch uses."""
    products: float
    """Operations of a product of large matrices in bf16."""

    @classmethod
    def measure(cls, device: torch.device, tiny: bool) -> Speeds:
        """On a device and its host; ``tiny``: of a few kilobytes, which means nothing."""
        size, side = (1 << 12, 64) if tiny else (1 << 28, 8192)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        copy = torch.empty_like(pinned, pin_memory=False)
        matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
        return cls(
            memory=2 * size / device_seconds(lambda: target.copy_(source), device),
            to_device=size / wall_seconds(lambda: target.copy_(pinned, non_blocking=True), device),
            to_host=size / wall_seconds(lambda: pinned.copy_(target, non_blocking=True), device),
            host=2 * size / wall_seconds(lambda: copy.copy_(pinned), device),
            products=2 * side**3 / device_seconds(lambda: matrix @ matrix, device),
        )

    def __str__(self) -> str:
        return (
            f"copies {self.memory / 1e9:.0f} GB/s on the device, {self.to_device / 1e9:.1f} to it, "
            f"{self.to_host / 1e9:.1f} from it, {self.host / 1e9:.1f} on the host; "
            f"products {self.products / 1e12:.1f} TFLOP/s"
        )


def the_device() -> torch.device:
    """The card, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What the device takes: the median of many runs, each with a cold L2 cache; of one run on a CPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1e3
    return wall_seconds(run, device, repetitions=1, warm_up=0)


def wall_seconds(run: Callable[[], Any], device: torch.device, repetitions: int = 15, warm_up: int = 2) -> float:
    """The median time until a run is through, on the device too."""
    taken = []
    for _ in range(warm_up + repetitions):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[warm_up:])[repetitions // 2]


def facts() -> dict[str, str]:
    """The card, its driver, and the versions of what its figures depend on.

    The driver is asked by its own tool: through torch, this process would take memory of the card.
    """
    card, driver = (_driver_says(field) for field in ("name", "driver_version"))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    return {"card": card, "driver": driver, **versions}


def _driver_says(field: str) -> str:
    if not torch.cuda.is_available():
        return "none"
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    speeds = Speeds.measure(the_device(), parser.parse_args().tiny)
    print(speeds)
    print(json.dumps(dataclasses.asdict(speeds)))


if __name__ == "__main__":
    main()
