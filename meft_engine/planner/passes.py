"""What each part of an adapter's step cannot do without, in bytes and operations, and how long they take then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Machine(Protocol):
    """How fast it is; a part takes at least as long as its bytes or its operations, whichever take longer."""

    bytes_per_second: float
    flops_per_second: float


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
    moment: int = 4,
) -> list[Part]:
    """Of one step with one micro-batch.

    Args:
        touched: share of the rows. size: bytes of a number in the rows that the model computes with.
        moment: bytes of a number in the moments.
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
        # A gradient is read; two moments and the master, fp32, are read and written.
        Part(
            "update",
            "AdamW of touched keys and values",
            layers * 2 * used * width * (12 + 4 * moment),
            layers * 2 * used * width * 15,
        ),
        Part("backward", "gradients of the router and of its input", 0, layers * 2 * 2 * tokens * width * experts),
    ]
