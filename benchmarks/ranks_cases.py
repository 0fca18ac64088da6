"""What is measured with several ranks: adapters, which of their rows the ranks touch, and what travels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from meft_engine.planner.network import Tables

WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape(Tables):
    """Of an adapter."""

    @property
    def expert_rows(self) -> int:
        """Rows of an expert, of which a rank owns whole ones."""
        return max(1, self.rows // 256)

    def __str__(self) -> str:
        return f"{self.tables} tables of {self.rows:,} × {self.width:,}"


@dataclass(frozen=True)
class Case:
    """What the ranks touch in every step, and how it travels.

    ``overlap`` is ``"random"`` (every rank draws by itself), ``"equal"`` or ``"disjoint"``. With ``nodes`` = 2 the
    first half of the ranks plays one node and the second half another, so that updated rows are published too.
    """

    percent: float
    overlap: str = "random"
    wire: str = "fp32"
    nodes: int = 1

    def touched(self, rows: int) -> int:
        """How many rows of a table of ``rows`` every rank touches."""
        return max(1, round(rows * self.percent / 100))

    def draw(self, rows: int, table: int, step: int, rank: int) -> Tensor:
        """[n] int64, unsorted as after a window of several micro-steps: the rows of a table that a rank touches."""
        count = self.touched(rows)
        own = rank if self.overlap == "random" else 0
        generator = torch.Generator().manual_seed((step * 1_000 + table) * 1_000 + own)
        order = torch.randperm(rows, generator=generator)
        if self.overlap == "disjoint":
            return order[rank * count : (rank + 1) * count]
        return order[:count]


@dataclass(frozen=True)
class Plan:
    """All that one world of ranks does."""

    shapes: Sequence[Shape]
    cases: Sequence[Case]
    repetitions: int
    peer_bytes: Sequence[int] = ()
    """Sizes of what each rank sends each other one where collectives alone are timed."""

    back_to_back: int = 30
    """How many small collectives are timed together."""

    dense: bool = True

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Plan:
        found = json.loads(path.read_text(encoding="utf-8"))
        shapes = [Shape(**shape) for shape in found.pop("shapes")]
        return Plan(shapes=shapes, cases=[Case(**case) for case in found.pop("cases")], **found)


def cases_of(ranks: int, percents: Sequence[float], middle: float) -> list[Case]:
    """What a world of so many ranks measures; other overlaps and played nodes at the ``middle`` percentage alone."""
    if ranks == 1:
        return [Case(percent) for percent in percents]
    cases = [Case(percent, wire=wire) for percent in percents for wire in WIRES]
    cases += [Case(middle, overlap) for overlap in ("equal", "disjoint") if overlap == "equal" or middle * ranks <= 100]
    if ranks % 2 == 0 and ranks > 2:
        cases.append(Case(middle, nodes=2))
    return cases
