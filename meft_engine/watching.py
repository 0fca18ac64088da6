"""Figures of a run while it runs: what the adapter uses, what it moves, and where the time goes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from meft_engine.recorder import Recorder

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

logger = logging.getLogger("meft_engine")

PREFIX = "Train/MEFT/"
"""Of the names in DeepSpeed's monitors."""


@dataclass(frozen=True)
class _Totals:
    """Counts since the engine was built."""

    steps: int
    micro_batches: int
    active_rows: int
    mass: Tensor
    loads: list[Tensor]
    bytes_to_device: int
    bytes_to_host: int
    seconds: dict[str, float]


class Window:
    """Figures of the optimizer steps since the last reading."""

    def __init__(self, engine: MeftEngine) -> None:
        self._engine = engine
        self._before = _count(engine)

    def read(self) -> dict[str, float]:
        """The figures, by name; one that does not exist here (a phase that did not occur) is absent.

        ``loss``, the mean of these steps; ``lr`` of the first group's keys; ``grad_norm``, the
        joint norm of the last step. ``touched_share`` of a layer's rows by a micro-batch; ``kept_mass``, the share of
        activation that the cap kept; ``dead_experts``, the share of experts that no token chose; ``load_entropy``, of
        the experts' load, 1 where it is even. ``bytes_to_device``, ``bytes_to_host`` and ``seconds/<phase>``, a step.
        ``host_memory_bytes``, resident in the process; ``device_memory_bytes``, at its peak where there is a GPU, else
        what the adapter would need there.
        """
        engine, before, now = self._engine, self._before, _count(self._engine)
        steps = now.steps - before.steps
        if steps < 1:
            return {}
        self._before = now
        found: dict[str, float] = {"lr": float(engine.row_optimizer.param_groups[0]["lr"])}
        losses = [float(loss) for step, loss in engine.step_losses if step > before.steps]
        if losses:
            found["loss"] = sum(losses) / len(losses)
        norm = engine.get_global_grad_norm()
        if norm is not None:
            found["grad_norm"] = float(norm)
        micro_batches = now.micro_batches - before.micro_batches
        if micro_batches:
            rows = engine.meft_config.adapter.rows
            found["touched_share"] = (now.active_rows - before.active_rows) / (micro_batches * rows)
            total, kept = (now.mass - before.mass).tolist()
            found["kept_mass"] = kept / total if total > 0 else 1.0
            loads = [late - early for late, early in zip(now.loads, before.loads, strict=True)]
            found["dead_experts"] = sum(float((load == 0).float().mean()) for load in loads) / len(loads)
            found["load_entropy"] = sum(map(_evenness, loads)) / len(loads)
        found["bytes_to_device"] = (now.bytes_to_device - before.bytes_to_device) / steps
        found["bytes_to_host"] = (now.bytes_to_host - before.bytes_to_host) / steps
        for name, seconds in now.seconds.items():
            spent = seconds - before.seconds.get(name, 0.0)
            if spent > 0:
                found[f"seconds/{name}"] = spent / steps
        found["host_memory_bytes"] = psutil.Process().memory_info().rss
        found["device_memory_bytes"] = _device_memory(engine)
        return found


class Watch:
    """Reads figures every ``monitor.interval`` steps, gives them to DeepSpeed's monitors and the run's log, and warns
    once of trouble."""

    def __init__(self, engine: MeftEngine) -> None:
        self._engine, self._config = engine, engine.meft_config.monitor
        self._window, self._breakdown = Window(engine), Window(engine)
        self._warned: set[str] = set()
        self.recorder = Recorder(engine)

    def after_step(self) -> None:
        """Call after every optimizer step."""
        engine = self._engine
        self.recorder.after_step()
        per_print = engine.steps_per_print()
        if engine.wall_clock_breakdown() and per_print and engine.global_steps % per_print == 0:
            log_breakdown(self._breakdown.read())
        if engine.global_steps % self._config.interval:
            return
        figures = self._window.read()
        if engine.monitor.enabled and engine.global_rank == 0:
            events = [(PREFIX + name, value, engine.global_samples) for name, value in figures.items()]
            engine.monitor.write_events(events)
        self.recorder.after_reading(figures)
        self._warn(figures)

    def conclude(self) -> None:
        """The steps since the last reading are the last before something else comes: read them too."""
        self.recorder.conclude(self._window.read())

    def restart(self) -> None:
        """Training goes on from elsewhere."""
        self._window, self._breakdown = Window(self._engine), Window(self._engine)
        self.recorder.restart()
        attach_to_model(self._engine, self)

    def finish(self) -> None:
        """Training is over."""
        self.conclude()
        self.recorder.finish()

    def _warn(self, figures: dict[str, float]) -> None:
        kept, dead = figures.get("kept_mass", 1.0), figures.get("dead_experts", 0.0)
        if kept < self._config.min_kept_mass:
            cap = self._engine.meft_config.active_rows.cap
            self._once(
                f"active_rows.cap = {cap} dropped {1 - kept:.0%} of the activation over the last "
                f"{self._config.interval} steps (monitor.min_kept_mass = {self._config.min_kept_mass:g}); raise the "
                "cap, shrink the micro-batch, or lower adapter.top_k",
                "kept_mass",
            )
        if dead > self._config.max_dead_experts:
            self._once(
                f"{dead:.0%} of the experts were chosen by no token over the last {self._config.interval} steps "
                f"(monitor.max_dead_experts = {self._config.max_dead_experts:g}), so their rows learn nothing; set "
                'router.balance = "loss" or "bias", or use fewer experts',
                "dead_experts",
            )

    def _once(self, message: str, kind: str) -> None:
        if kind not in self._warned and self._engine.global_rank == 0:
            logger.warning("%s", message)
        self._warned.add(kind)


def log_breakdown(figures: dict[str, float]) -> None:
    """One line in the form of DeepSpeed's own timers."""
    parts = [
        f"{name.removeprefix('seconds/')}: {1e3 * value:.2f}"
        for name, value in figures.items()
        if name.startswith("seconds/")
    ]
    if parts:
        logger.info("MEFT time (ms) | %s", " | ".join(parts))


def _count(engine: MeftEngine) -> _Totals:
    adapters = list(engine.meft_adapters.adapters.values())
    stats, tables = [adapter.stats for adapter in adapters], engine.meft_adapters.tables()
    masses = [s.mass.cpu() for s in stats if s.mass is not None]
    return _Totals(
        steps=engine.global_steps,
        micro_batches=sum(s.micro_batches for s in stats),
        active_rows=sum(int(s.active_rows) for s in stats),
        mass=torch.stack(masses).sum(0) if masses else torch.zeros(2, dtype=torch.float64),
        loads=[s.load.cpu() if s.load is not None else torch.zeros(()) for s in stats],
        bytes_to_device=sum(table.bytes_to_device + table.bytes_of_updates for table in tables),
        bytes_to_host=sum(table.bytes_to_host for table in tables),
        seconds=engine.phases.seconds(),
    )


def _evenness(load: Tensor) -> float:
    """Entropy of a load [N] over log N: 1 where it is even, 0 where one expert gets all."""
    if load.numel() < 2:
        return 1.0
    share = load / load.sum().clamp(min=1)
    return float(torch.special.entr(share).sum()) / math.log(load.numel())


def _device_memory(engine: MeftEngine) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return engine.meft_report()["device_bytes"]


def attach_to_model(engine: MeftEngine, watch: Watch) -> None:
    """Let what logs about the engine's model find the engine."""
    vars(engine.module).update(_meft_window=Window(engine), _meft_watch=watch)


def detach_from_model(model: Any) -> None:
    """Undo :func:`attach_to_model`."""
    for name in ("_meft_window", "_meft_watch"):
        vars(model).pop(name, None)


def window_of(model: Any) -> Window | None:
    """Of the engine that trains a model, if one does; its readings are a Trainer's, apart from those of its watch."""
    return vars(model).get("_meft_window") if hasattr(model, "__dict__") else None


def watch_of(model: Any) -> Watch | None:
    """Of the engine that trains a model, if one does."""
    return vars(model).get("_meft_watch") if hasattr(model, "__dict__") else None
