"""Timing one contestant at a time, with cold caches, and writing down what came out."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from contestants import BYTES_PER_ELEMENT_BF16_MOMENTS
from torch import Tensor

_COLUMNS = (
    *("contestant", "case", "rows", "repetitions", "median_ms", "first_quartile_ms", "third_quartile_ms"),
    *("bytes", "gb_per_s", "floor_ms", "time_over_floor"),
)


@dataclass
class Timing:
    """What a contestant took in one case, in every repetition.

    ``moved`` are the bytes that the case cannot do without: each number that is needed is read once and each that
    changes is written once. 0 where that is not the point.
    """

    contestant: str
    case: str
    rows: int
    moved: int = 0
    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """In seconds."""
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        """In seconds."""
        return self.quantile(0.5)

    @property
    def bandwidth(self) -> float:
        """``moved`` bytes per second."""
        return self.moved / self.median

    def line(self, floor_bandwidth: float) -> str:
        """For people: the time, its quartiles, and the floor beside it."""
        spread = f"{self.quantile(0.25) * 1e3:.2f} to {self.quantile(0.75) * 1e3:.2f}"
        text = f"{self.contestant:<24} {self.case:<28} {self.median * 1e3:9.2f} ms (quartiles {spread})"
        if not self.moved:
            return text
        floor = self.moved / floor_bandwidth
        return f"{text}, {self.bandwidth / 1e9:.1f} GB/s; floor {floor * 1e3:.2f} ms, ×{self.median / floor:.2f}"


class Contestant(Protocol):
    """An optimizer and its table."""

    def prepare_all(self, grad: Tensor) -> None:
        """Hand over a gradient of all rows."""

    def step(self) -> None:
        """Update the rows that have a gradient."""


class Stopwatch:
    """Times steps in the middle of a model: just before, the same optimizer has updated another table.

    So data are cold, whatever was generated a moment ago, and code is warm; and caches are full of lines that have yet
    to be written back, as many as such a step leaves behind itself. Were they clean, a small case would not pay for
    what it leaves; were they all changed, it would pay for what others left.

    Args:
        cache_bytes: of the last-level cache; the other table's update moves at least four times as many.
        width: of the tables.
    """

    def __init__(self, cache_bytes: int, width: int) -> None:
        self.rows = max(16, -(-4 * cache_bytes // (BYTES_PER_ELEMENT_BF16_MOMENTS * width)))
        """Of the other tables."""
        self._grad = torch.randn(self.rows, width)

    def time(self, timing: Timing, contestant: Contestant, other: Contestant) -> None:
        """Add the seconds of a step of ``contestant`` to ``timing``, after one of ``other``, its like."""
        other.prepare_all(self._grad)
        other.step()
        start = time.perf_counter()
        contestant.step()
        timing.seconds.append(time.perf_counter() - start)


def copy_bandwidth(count: int, repetitions: int) -> Timing:
    """torch's copy of ``count`` floats from one place to another; counts what is read and what is written."""
    source, target = torch.ones(count), torch.zeros(count)
    timing = Timing("torch copy_", "memory to memory", 0, moved=2 * source.nbytes)
    target.copy_(source)
    for _ in range(repetitions):
        start = time.perf_counter()
        target.copy_(source)
        timing.seconds.append(time.perf_counter() - start)
    return timing


def write_csv(path: Path, timings: Sequence[Timing], floor_bandwidth: float) -> None:
    """One line for each contestant and case; floors are the time of its bytes at ``floor_bandwidth``."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for timing in timings:
            quartiles = [f"{timing.quantile(q) * 1e3:.4f}" for q in (0.5, 0.25, 0.75)]
            bounds: list[object] = ["", "", "", ""]
            if timing.moved:
                floor = timing.moved / floor_bandwidth
                rest = (timing.bandwidth / 1e9, floor * 1e3, timing.median / floor)
                bounds = [timing.moved, *(f"{value:.4f}" for value in rest)]
            writer.writerow([timing.contestant, timing.case, timing.rows, len(timing.seconds), *quartiles, *bounds])
