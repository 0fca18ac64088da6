"""What each part of an adapter's step cannot do without, in bytes and operations, and how long they take here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from measure import copy_bandwidth


@dataclass(frozen=True)
class Machine:
    """How fast it is; a part takes at least as long as its bytes or its operations, whichever take longer."""

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


@dataclass(frozen=True)
class Part:
    """A part of the step, over all layers."""

    phase: str
    what: str
    moved: float
    """Bytes from and to memory."""
    flops: float

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.moved / machine.bytes_per_second, self.flops / machine.flops_per_second)


def parts(
    *,
    layers: int,
    tokens: int,
    width: int,
    rows: int,
    experts: int,
    per_token: int,
    top_k: int,
    touched: float,
    size: int,
) -> list[Part]:
    """Of one step with one micro-batch.

    Args:
        touched: share of the rows. size: bytes of a number in the rows that the model computes with.
    """
    used, picks, candidates = touched * rows, tokens * top_k, per_token * rows // experts
    line = width * size
    return [
        Part(
            "route",
            "router, scores of candidates, top-K: reads the keys",
            layers * (rows * line + experts * width * 4),
            layers * 2 * tokens * width * (experts + candidates),
        ),
        Part("combine", "sum of values: reads touched rows", layers * used * line, layers * 2 * picks * width),
        Part(
            "row_gradients",
            "way back: reads touched keys and values, writes their gradients",
            layers * used * width * (2 * size + 2 * 4),
            layers * 4 * 2 * picks * width,
        ),
        # A gradient is read; two moments and the master are read and written, in fp32.
        Part(
            "update", "AdamW of touched keys and values", layers * 2 * used * width * 28, layers * 2 * used * width * 15
        ),
        Part("backward", "gradients of the router and of its input", 0, layers * 2 * 2 * tokens * width * experts),
    ]
