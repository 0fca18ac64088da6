"""Steps of one table: ours beside DeepSpeedCPUAdam and SparseAdam, and ours with ever more rows in the table."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from contestants import BYTES_PER_ELEMENT, BYTES_PER_ELEMENT_BF16_MOMENTS, DenseDeepSpeed, Ours, TorchSparse
from measure import Stopwatch, Timing

SHARES = (0.1, 0.3, 1, 3, 10, 30, 100)  # percent of the rows
COMPARED = (1, 10, 100)  # those that have a target against DeepSpeedCPUAdam
LARGEST_SPARSE = 30  # SparseAdam's time and memory grow too large beyond
GROWTH, GROWTH_ROWS = 16, 2000


@dataclass
class Contest:
    """Timings, those that depend on it by the percentage of touched rows."""

    dense: Timing
    ours: dict[float, Timing] = field(default_factory=dict)
    half: dict[float, Timing] = field(default_factory=dict)

    def timings(self) -> list[Timing]:
        return [*self.ours.values(), *self.half.values(), self.dense]


class Comparison:
    """Ours, with moments of either precision, against DeepSpeedCPUAdam."""

    def __init__(self, rows: int, width: int, threads: int, cache: int) -> None:
        self._rows, self._watch = rows, Stopwatch(cache, width)
        self._grad = torch.randn(rows, width)
        start = torch.randn(rows, width).mul_(0.02)
        self._ours, self._half = Ours(rows, width, threads), Ours(rows, width, threads, torch.bfloat16)
        self._dense = DenseDeepSpeed(start)
        self._dense.prepare_all(self._grad)
        for table in (self._ours.table, self._half.table):
            table.fill(start)
        few = self._watch.rows
        self._before = {
            id(self._ours): Ours(few, width, threads),
            id(self._half): Ours(few, width, threads, torch.bfloat16),
            id(self._dense): DenseDeepSpeed(torch.zeros(few, width)),
        }

        def timing(contestant: str, share: float, per_element: int) -> Timing:
            count = _count(rows, share)
            return Timing(contestant, f"{share:g} % of the rows", count, count * width * per_element)

        self.found = Contest(timing("DeepSpeedCPUAdam", 100, BYTES_PER_ELEMENT))
        for share in SHARES:
            self.found.ours[share] = timing("ours", share, BYTES_PER_ELEMENT)
            self.found.half[share] = timing("ours, bf16 moments", share, BYTES_PER_ELEMENT_BF16_MOMENTS)

    def run(self, repetitions: int, advance: Callable[[], None]) -> Contest:
        """Step everything in random order, with new rows and gradients in each repetition."""
        cases: list[Callable[[], None]] = [self._time_dense] * len(COMPARED)
        cases += [partial(self._time, timing, self._ours) for timing in self.found.ours.values()]
        cases += [partial(self._time, timing, self._half) for timing in self.found.half.values()]
        for repetition in _repetitions(repetitions, self.found.timings(), advance):
            self._grad.normal_()
            self._order = _order(self._rows, repetition)
            self._ours.touch(), self._half.touch()
            # What ran before, and for how long, is felt by what runs next.
            random.shuffle(cases)
            for case in cases:
                case()
        return self.found

    def _time_dense(self) -> None:
        self._watch.time(self.found.dense, self._dense, self._before[id(self._dense)])

    def _time(self, timing: Timing, contestant: Ours) -> None:
        contestant.prepare(self._order[: timing.rows], self._grad[: timing.rows])
        self._watch.time(timing, contestant, self._before[id(contestant)])

    def close(self) -> None:
        """Give the memory back."""
        for contestant in (self._ours, self._half, *list(self._before.values())[:2]):
            contestant.close()


class Growth:
    """Equally many rows of a table and of one with many times the rows."""

    def __init__(self, rows: int, width: int, threads: int, cache: int) -> None:
        self._sizes = (rows, GROWTH * rows)
        count = min(GROWTH_ROWS, rows // 8)
        self._tables = [Ours(size, width, threads) for size in self._sizes]
        self._watch = Stopwatch(cache, width)
        self._before = Ours(self._watch.rows, width, threads)
        self._grad = torch.empty(count, width)
        moved = count * width * BYTES_PER_ELEMENT
        self.found = [Timing("ours", f"{count:,} of {size:,} x {width}", count, moved) for size in self._sizes]

    def run(self, repetitions: int, advance: Callable[[], None]) -> list[Timing]:
        """Step both in random order."""
        for _ in _repetitions(repetitions, self.found, advance):
            self._grad.normal_()
            for table in self._tables:
                table.touch()
            for k in random.sample(range(2), 2):
                rows = torch.randperm(self._sizes[k])[: len(self._grad)]
                self._tables[k].prepare(rows, self._grad)
                self._watch.time(self.found[k], self._tables[k], self._before)
        return self.found

    def close(self) -> None:
        """Give the memory back."""
        for table in (*self._tables, self._before):
            table.close()


def step_sparse(
    rows: int, width: int, threads: int, cache: int, repetitions: int, advance: Callable[[], None]
) -> dict[float, Timing]:
    """SparseAdam by the percentage of touched rows, with the rows of :class:`Comparison`, each in a process of its own.

    Its steps take and free hundreds of megabytes, of which whatever runs beside them feels the consequences: steps of
    ours took up to four times as long. And whether that memory comes from the system each time or from what malloc has
    kept, which makes a difference of two, depends on all that the process did before.
    """
    found = {}
    for share in SHARES:
        if share <= LARGEST_SPARSE:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                arguments = (rows, width, threads, cache, repetitions, share)
                found[share] = process.submit(_step_sparse, *arguments).result()
            advance()
    return found


def _step_sparse(rows: int, width: int, threads: int, cache: int, repetitions: int, share: float) -> Timing:
    torch.set_num_threads(threads)
    start = torch.randn(rows, width).mul_(0.02)
    sparse, watch = TorchSparse(start), Stopwatch(cache, width)
    before = TorchSparse(start[: watch.rows])
    count = _count(rows, share)
    grad = torch.empty(count, width)
    timing = Timing("torch SparseAdam", f"{share:g} % of the rows", count, count * width * BYTES_PER_ELEMENT)
    for repetition in _repetitions(repetitions, [timing], lambda: None):
        sparse.prepare(_order(rows, repetition)[:count], grad.normal_())
        watch.time(timing, sparse, before)
    return timing


def _order(rows: int, repetition: int) -> torch.Tensor:
    """All rows in the random order of a repetition."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(repetition + 1))


def _count(rows: int, share: float) -> int:
    return max(1, round(rows * share / 100))


def _repetitions(count: int, timings: list[Timing], advance: Callable[[], None]) -> Iterator[int]:
    """So many rounds after a first that is not counted, which allocates, compiles and warms up."""
    for repetition in range(-1, count):
        yield repetition
        if repetition < 0:
            for timing in timings:
                timing.seconds.clear()
        advance()
