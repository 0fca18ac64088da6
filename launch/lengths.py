"""How long examples are, shown before training: what fits, what a batch will weigh, how much of it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from collator import IGNORED
from rich.table import Table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SAMPLE = 1000
"""Examples of a stream that are looked at."""


@dataclass(frozen=True)
class Lengths:
    """Token counts of encoded examples."""

    name: str
    counts: np.ndarray
    """[examples] of tokens."""
    learned: int
    """Tokens that the loss is on."""
    sampled: bool
    """Only the first examples of a stream were counted."""

    @property
    def total(self) -> int:
        """Tokens in all."""
        return int(self.counts.sum())


def measure(name: str, examples: Dataset | IterableDataset) -> Lengths:
    """Count the tokens of encoded examples; of a stream, of its first thousand."""
    sampled = not hasattr(examples, "__len__")
    counts, learned = [], 0
    for example in islice(examples, _SAMPLE if sampled else None):
        counts.append(len(example["input_ids"]))
        learned += sum(label != IGNORED for label in example["labels"])
    return Lengths(name, np.array(counts, dtype=np.int64), learned, sampled)


def table(found: list[Lengths], max_length: int) -> Table:
    """For people; one line for each set of examples."""
    titles = ("examples", "tokens", "learned", "shortest", "median", "95 %", "longest")
    result = Table("", *titles, title=f"Length of examples in tokens (max_length {max_length})")
    for lengths in found:
        quantiles = np.quantile(lengths.counts, (0, 0.5, 0.95, 1)) if lengths.counts.size else [0] * 4
        count = f"first {lengths.counts.size:,}" if lengths.sampled else f"{lengths.counts.size:,}"
        share = f"{lengths.learned / max(1, lengths.total):.0%}"
        result.add_row(lengths.name, count, f"{lengths.total:,}", share, *(f"{q:,.0f}" for q in quantiles))
    return result
