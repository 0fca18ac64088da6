"""Writes the log of a run while it runs: rank 0, at the readings that are taken anyway, and never for long.

The records, beside ``kind`` and ``time``:

* ``start``: what is trained and how, written after the first step, when it is known what a micro-batch holds; once more
  where a run goes on from a checkpoint, ``step`` being the one that it goes on from. ``planned`` are bytes by kind.
* ``step``, every ``monitor.interval`` steps and at the end: ``samples``; ``tokens`` that rank 0 has routed, without
  padding, and ``seconds``, both since training began or went on; ``figures`` of
  :meth:`meft_engine.watching.Window.read`.
* ``layers``, at the first reading, every fifth one after it and at the end: of the steps since the last of them
  (``since``), by layer, rank 0's ``load`` of the experts (tokens that chose them, of ``experts_a_bin`` neighbours
  each), ``dead`` experts, ``touched`` share of the rows by a micro-batch and ``kept`` mass; and ``updates``, how many
  of rank 0's rows have been updated so often since the first step: at least ``update_bins`` times, less than the next.
* ``memory``, beside ``layers``: bytes as they are allocated, by kind, of ``host`` and ``device``; ``host_resident`` in
  the process; ``device_peak`` where there is a GPU.
* ``validation``: what a Trainer's evaluation found, as ``figures``.
* ``evaluation``: what ``launch/evaluate.py`` found, of sets of questions, as ``results``.
* ``end``: whether training ended by itself or by an ``error``.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from meft_engine import __version__, run_log
from meft_engine.config import MeftConfig
from meft_engine.planner import device_bytes_needed
from meft_engine.planner.rows import host_rows_by_kind
from meft_engine.report import device_bytes_by_kind, host_bytes_by_kind

if TYPE_CHECKING:
    from meft_engine.adapter.module import SparseAdapter
    from meft_engine.engine import MeftEngine

READINGS_PER_LAYERS = 5
MOST_BINS = 64
"""Of experts, in a ``layers`` record."""


@dataclass
class _LayerTotals:
    """What one adapter has counted, on the host."""

    micro_batches: int
    active_rows: int
    mass: Tensor
    load: Tensor


class Recorder:
    """Of one engine.

    Args:
        engine: complete but for this.
    """

    def __init__(self, engine: MeftEngine) -> None:
        self._engine, folder = engine, engine.meft_config.monitor.folder
        self._writes = engine.global_rank == 0
        self._log = run_log.RunLog(Path(folder) if folder is not None and self._writes else None)
        self._readings = 0
        self.restart()

    def restart(self) -> None:
        """Training begins, or goes on from elsewhere."""
        self._started, self._began = False, time.monotonic()
        self._before, self._counted_to = self._count(), self._engine.global_steps
        self._tokens_before = self._tokens()

    def begin(self, folder: Path) -> None:
        """A script that has a folder of its own begins to train; the block's folder comes first."""
        if self._writes and self._engine.meft_config.monitor.folder is None:
            self._log.folder = folder
        self._began = time.monotonic()

    def after_step(self) -> None:
        """Say what is trained, if that has not been said."""
        if not self._started and self._log.folder is not None:
            self._started = True
            self._log.append("start", self._engine.global_steps - 1, **self._start())

    def after_reading(self, figures: Mapping[str, float]) -> None:
        """Put down the figures that have just been read."""
        if self._log.folder is None:
            return
        self._step(figures)
        if self._readings % READINGS_PER_LAYERS == 0:
            self._look_closely()
        self._readings += 1

    def conclude(self, figures: Mapping[str, float]) -> None:
        """Put down the figures of steps after which something else comes, if there have been any."""
        if self._log.folder is None:
            return
        if figures:
            self._step(figures)
        if self._engine.global_steps > self._counted_to:
            self._look_closely()

    def validated(self, logs: Mapping[str, Any]) -> None:
        """Put down what a Trainer's evaluation found."""
        figures = {name: value for name, value in logs.items() if isinstance(value, int | float) and name != "epoch"}
        self._log.append("validation", self._engine.global_steps, figures=figures)

    def finish(self) -> None:
        """Training is over."""
        self._log.end()

    def _tokens(self) -> int:
        return max(adapter.stats.tokens for adapter in self._adapters())

    def _step(self, figures: Mapping[str, float]) -> None:
        self._log.append(
            "step",
            self._engine.global_steps,
            samples=self._engine.global_samples,
            tokens=self._tokens() - self._tokens_before,
            seconds=round(time.monotonic() - self._began, 3),
            figures=figures,
        )

    def _start(self) -> dict[str, Any]:
        engine, attached = self._engine, self._engine.meft_adapters
        block, tables = engine.meft_config, attached.tables()
        widths = [adapter.values.width for adapter in attached.adapters.values()]
        report = engine.meft_report()
        tokens = max(adapter.stats.most_tokens for adapter in attached.adapters.values())
        group = engine.basic_optimizer.param_groups[0]
        settings = {name: group[name] for name in ("betas", "eps", "weight_decay") if name in group}
        node = len(engine.ranks.node)
        model = getattr(getattr(engine.module, "config", None), "_name_or_path", None)
        return {
            "model": model or type(engine.module).__name__,
            "block": block.resolved(),
            "layers": list(attached.adapters),
            "rows": block.adapter.rows,
            "width": widths[0] if len(set(widths)) == 1 else widths,
            "adapter_parameters": report["adapter_parameters"],
            "base_parameters": report["base_parameters"],
            "dense_device_bytes": report["dense_device_bytes"],
            "compute_dtype": str(attached.compute_dtype).removeprefix("torch."),
            "ranks": engine.ranks.size,
            "nodes": len(engine.ranks.nodes),
            "zero_stage": engine.zero_optimization_stage(),
            "batch": {
                "micro_batch": engine.train_micro_batch_size_per_gpu(),
                "accumulation_steps": engine.gradient_accumulation_steps(),
                "samples_a_step": engine.train_batch_size(),
                "most_tokens_of_a_micro_batch": tokens,
            },
            "optimizer": {
                "name": type(engine.basic_optimizer).__name__,
                "lr": float(group.get("initial_lr", group["lr"])),
                **settings,
                "gradient_clipping": engine.gradient_clipping(),
                "lr_scheduler": type(engine.lr_scheduler).__name__ if engine.lr_scheduler is not None else None,
            },
            "device": _device_name(),
            "versions": _versions(),
            "planned": {
                "host": planned_host_bytes(
                    block, widths, compute_dtype=attached.compute_dtype, ranks=engine.ranks.size, ranks_of_node=node
                ),
                "device": device_bytes_needed(
                    block, len(widths), max(widths), tokens, compute_dtype=attached.compute_dtype
                ),
                "ranks_of_node": node,
            },
            "device_is_host": tables[0].device.type == "cpu",
        }

    def _look_closely(self) -> None:
        engine, now = self._engine, self._count()
        spent = {name: (self._before[name], totals) for name, totals in now.items()}
        since, step, rows = self._counted_to, engine.global_steps, engine.meft_config.adapter.rows
        self._before, self._counted_to = now, step
        if all(late.micro_batches > early.micro_batches for early, late in spent.values()):
            loads = [(late.load - early.load).round().long() for early, late in spent.values()]
            mass = [(late.mass - early.mass).tolist() for early, late in spent.values()]
            experts_a_bin = -(-max(load.numel() for load in loads) // MOST_BINS)
            bins, updates = update_counts([self._updates(adapter) for adapter in self._adapters()])
            self._log.append(
                "layers",
                step,
                since=since,
                experts=max(load.numel() for load in loads),
                experts_a_bin=experts_a_bin,
                load=[[int(part.sum()) for part in load.split(experts_a_bin)] for load in loads],
                dead=[int((load == 0).sum()) for load in loads],
                touched=[
                    (late.active_rows - early.active_rows) / ((late.micro_batches - early.micro_batches) * rows)
                    for early, late in spent.values()
                ],
                kept=[kept / total if total > 0 else 1.0 for total, kept in mass],
                update_bins=bins,
                updates=updates,
            )
        self._log.append(
            "memory",
            step,
            host=host_bytes_by_kind(engine.meft_adapters, engine.row_optimizer),
            device=device_bytes_by_kind(engine.meft_adapters),
            host_resident=psutil.Process().memory_info().rss,
            device_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )

    def _adapters(self) -> list[SparseAdapter]:
        return list(self._engine.meft_adapters.adapters.values())

    def _count(self) -> dict[str, _LayerTotals]:
        return {
            adapter.name: _LayerTotals(
                adapter.stats.micro_batches,
                int(adapter.stats.active_rows),
                torch.zeros(2, dtype=torch.float64) if adapter.stats.mass is None else adapter.stats.mass.cpu(),
                torch.zeros(()) if adapter.stats.load is None else adapter.stats.load.cpu(),
            )
            for adapter in self._adapters()
        }

    def _updates(self, adapter: SparseAdapter) -> Tensor | None:
        """[n] int32: how often each of this rank's rows has been updated; ``None`` where the optimizer does not count.

        Of rows that are being updated now, either number. Keys and values of a row are updated together.
        """
        optimizer, table = self._engine.row_optimizer, adapter.keys
        if optimizer.mode != "lazy":
            return None
        steps = optimizer.state[table.handle]["step"]
        if table.hot is not None:
            steps = steps.clone()
            rows, there = table.hot.steps_of(table)
            steps[rows] = there
        return steps[table.owned]


def planned_host_bytes(
    config: MeftConfig, widths: list[int], *, compute_dtype: torch.dtype, ranks: int, ranks_of_node: int
) -> dict[str, int]:
    """What is planned for a node, by the kinds that are measured: ``rows``, ``moments`` and ``steps``."""
    kinds: Counter[str] = Counter()
    for width in widths:
        kinds.update(
            host_rows_by_kind(config, 1, width, compute_dtype=compute_dtype, ranks=ranks, ranks_of_node=ranks_of_node)
        )
    rows = kinds["compute_copies"] + kinds["lower_planes"]
    return {"rows": rows, "moments": kinds["moments"], "steps": kinds["steps"]}


def update_counts(updates: list[Tensor | None]) -> tuple[list[int], list[list[int]] | None]:
    """How many rows have been updated 0 times, 1, 2 or 3, 4 to 7, ….

    Args:
        updates: [n] of each layer, how often each row has been.

    Returns:
        The least number of each bin, and by layer how many rows are in it; ``None`` where it is not known.
    """
    if any(of_layer is None for of_layer in updates):
        return [], None
    most = max(int(of_layer.max()) if of_layer.numel() else 0 for of_layer in updates)
    edges = [2**power for power in range(most.bit_length())]
    limits = torch.tensor(edges, dtype=torch.int32)
    found = [torch.bucketize(of_layer, limits, right=True, out_int32=True) for of_layer in updates]
    return [0, *edges], [torch.bincount(of_layer, minlength=len(edges) + 1).tolist() for of_layer in found]


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"meft_engine": __version__, "python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
