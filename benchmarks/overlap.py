"""How much of an update the next forward hides, with the layers' tables and the worker of the product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from contestants import BETAS, BYTES_PER_ELEMENT, EPS, LR, WEIGHT_DECAY
from measure import Timing

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.optim.worker import UpdateWorker

# A forward lasts this many times the update.
_FORWARD = 1.5
_TOUCHED = 0.2
_GATHERED = 32


class _Model:
    """Layers of a keys and a values table each, their optimizer on one thread, and its worker."""

    def __init__(self, layers: int, rows: int, width: int) -> None:
        def table(layer: int, role: str) -> PartiallyOffloadedTensor:
            return PartiallyOffloadedTensor(
                f"layers.{layer}/{role}",
                rows,
                width,
                device=torch.device("cpu"),
                compute_dtype=torch.bfloat16,
                resident=role == "keys",
            )

        self.layers = [(table(i, "keys"), table(i, "values")) for i in range(layers)]
        self.tables = [table for pair in self.layers for table in pair]
        self.optimizer = SparseCPUAdam(self.tables, LR, BETAS, EPS, WEIGHT_DECAY, threads=1)
        self.worker = UpdateWorker(timeout=120.0)
        self._touched = max(1, int(rows * _TOUCHED))
        self._grad = torch.empty(len(self.tables), self._touched, width)
        self._rows: list[torch.Tensor] = []
        self.moved = self._grad.numel() * BYTES_PER_ELEMENT
        self.touched = self._touched * len(self.tables)

    def draw(self) -> None:
        """New rows and new gradients for all tables."""
        self._grad.normal_()
        self._rows = [torch.randperm(table.rows)[: self._touched] for table in self.tables]

    def accumulate(self) -> None:
        """Give the tables their gradients."""
        self.optimizer.zero_grad()
        for table, rows, grad in zip(self.tables, self._rows, self._grad, strict=True):
            table.accumulate(rows, grad)

    def update(self) -> None:
        """A step with nothing beside it."""
        self.worker.submit(self.optimizer.updates())
        self.worker.drain()

    def forward(self, work: Callable[[], None]) -> None:
        """Each layer reads its tables, for which it waits if it has to, and then works."""
        for (keys, values), rows in zip(self.layers, self._rows[1::2], strict=True):
            keys.compute_copy()
            values.gather(rows[:_GATHERED])
            work()

    def both(self, work: Callable[[], None]) -> None:
        """A step, the forward that follows at once, and whatever of the update is then still left."""
        self.worker.submit(self.optimizer.updates())
        self.forward(work)
        self.worker.drain()

    def close(self) -> None:
        self.worker.close()
        self.optimizer.close()


def measure(layers: int, rows: int, width: int, repetitions: int, advance: Callable[[], None]) -> dict[str, Timing]:
    """Time the update alone, and two forwards alone and overlapped: one that sleeps and one that works on all cores.

    Returns:
        timings ``update``, ``sleep/forward``, ``sleep/both``, ``matmul/forward`` and ``matmul/both``.
    """
    model = _Model(layers, rows, width)
    try:
        for _ in range(2):
            model.draw()
            model.accumulate()
            alone = _seconds(model.update)
        works = {"sleep": _sleeping(_FORWARD * alone / layers), "matmul": _multiplying(_FORWARD * alone / layers)}
        found = {"update": Timing("ours, 1 thread", f"{layers} layers, update alone", model.touched, model.moved)}
        for name in works:
            for part, text in (("forward", "forward alone"), ("both", "update and forward")):
                found[f"{name}/{part}"] = Timing("ours, 1 thread", f"{text}, {name}", model.touched)
        for _ in range(repetitions):
            model.draw()
            model.accumulate()
            found["update"].seconds.append(_seconds(model.update))
            for name, work in works.items():
                found[f"{name}/forward"].seconds.append(_seconds(lambda work=work: model.forward(work)))
                model.accumulate()
                found[f"{name}/both"].seconds.append(_seconds(lambda work=work: model.both(work)))
            advance()
        return found
    finally:
        model.close()


def hidden_share(found: dict[str, Timing], forward: str) -> float:
    """The part of the update's own time that does not show up in the time of update and forward together."""
    added = found[f"{forward}/both"].median - found[f"{forward}/forward"].median
    return 1 - added / found["update"].median


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def _multiplying(seconds: float) -> Callable[[], None]:
    """Matrix products that take about that long when nothing else runs."""
    tokens, weight = torch.randn(64, 1024), torch.randn(1024, 1024)
    out = torch.empty(64, 1024)
    torch.mm(tokens, weight, out=out)
    one = sorted(_seconds(lambda: torch.mm(tokens, weight, out=out)) for _ in range(9))[4]
    count = max(1, round(seconds / one))

    def work() -> None:
        for _ in range(count):
            torch.mm(tokens, weight, out=out)

    return work
