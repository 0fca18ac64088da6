"""Rows from the host's memory to the device: read in place by a kernel, or gathered on the host and copied.

A stage of ``gpu.py``: prints a line for each way, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_machine import the_device, wall_seconds
from torch import Tensor

from meft_kernels.slots import Residency
from meft_kernels.triton.gather import gather

PROGRAMS = (1, 2, 4, 8, 16, 32, 64)


class Transfers:
    """Half of a table's rows, drawn at random, and the ways in which they reach the device.

    Args:
        rows, width: of the table. device: where they go.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.device, pins = device, device.type == "cuda"
        # The interpreter's bf16 is wrong.
        self.table = torch.randn(rows, width).to(torch.bfloat16 if pins else torch.float32)
        self.table = self.table.pin_memory() if pins else self.table
        self.asked = torch.randperm(rows)[: rows // 2].sort().values
        self.into = torch.empty(rows // 2, width, dtype=self.table.dtype, device=device)
        self.staged = torch.empty_like(self.into, device="cpu", pin_memory=pins)
        self._rows = self.asked.int().to(device)
        self._count = torch.tensor([rows // 2], dtype=torch.int32, device=device)
        self._residency = Residency.empty(rows, rows // 2, device)

    @property
    def moved(self) -> int:
        """Bytes over the bus."""
        return self.into.nbytes

    def copy(self) -> None:
        """As many bytes from one piece of pinned memory: what the bus can do."""
        self.into.copy_(self.staged, non_blocking=True)

    def stage(self) -> None:
        """The host gathers the rows into pinned memory, from where they are copied."""
        torch.index_select(self.table, 0, self.asked, out=self.staged)
        self.copy()

    def gather(self, programs: int) -> Tensor:
        """The device reads the rows where they are, all of them, since all have changed; returns their slots."""
        self._residency.version_of_row += 1
        found = gather(self.table, self.into, self._rows, self._count, self._residency, programs=programs)
        return found.slots


def measure(transfers: Transfers, repetitions: int) -> dict[str, Any]:
    """GB/s of each way; ``gather_over_copy``: of the best number of programs, by that of a plain copy.

    Raises:
        ValueError: where rows arrive that were not asked for.
    """

    def speed(run: Callable[[], Any]) -> float:
        return transfers.moved / wall_seconds(run, transfers.device, repetitions) / 1e9

    slots = transfers.gather(PROGRAMS[-1]).cpu().long()
    if not torch.equal(transfers.into.cpu()[slots], transfers.table[transfers.asked]):
        raise ValueError("gather: rows have arrived that were not asked for")
    figures = {"copy_gb_per_s": speed(transfers.copy), "staged_gb_per_s": speed(transfers.stage)}
    print(f"{transfers.moved / 1e6:.1f} MB in rows of {transfers.table[0].nbytes / 1e3:.1f} KB")
    print(f"{'plain copy':<24} {figures['copy_gb_per_s']:7.2f} GB/s")
    print(f"{'staged':<24} {figures['staged_gb_per_s']:7.2f} GB/s")
    by_programs = {}
    for programs in PROGRAMS:
        by_programs[programs] = speed(lambda programs=programs: transfers.gather(programs))
        share = by_programs[programs] / figures["copy_gb_per_s"]
        print(f"{f'gather, {programs} programs':<24} {by_programs[programs]:7.2f} GB/s, {share:.2f} of the copy")
    best = max(by_programs, key=by_programs.get)
    figures["best_programs"] = best
    figures["gather_over_copy"] = by_programs[best] / figures["copy_gb_per_s"]
    figures |= {f"gather_{programs}_gb_per_s": found for programs, found in by_programs.items()}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="few and narrow rows, which show that all of it runs")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    rows, width, repetitions = (24, 48, 1) if tiny else (32768, 4096, 15)
    try:
        figures = measure(Transfers(rows, width, the_device()), repetitions)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
