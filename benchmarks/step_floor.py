"""How fast this machine is, which floors of a step rest on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from measure import copy_bandwidth


@dataclass(frozen=True)
class Machine:
    """See :class:`meft_engine.planner.passes.Machine`."""

    bytes_per_second: float
    """Of a copy in memory, read and written."""
    flops_per_second: float
    """Of a product in fp32 of the size of the frozen model's."""

    @classmethod
    def measure(cls, tokens: int = 512, width: int = 576, wide: int = 1536, repetitions: int = 20) -> Machine:
        """With the threads that torch uses."""
        a, b = torch.randn(tokens, width), torch.randn(width, wide)
        seconds = []
        for _ in range(repetitions + 2):
            began = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - began)
        seconds = sorted(seconds[2:])[repetitions // 2]
        return cls(copy_bandwidth(1 << 26, 7).bandwidth, 2 * tokens * width * wide / seconds)

    def at_best(self, other: Machine) -> Machine:
        """Of two measurements the faster, which is what a floor has to hold against."""
        return Machine(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )
