"""What an adapter is, what it holds where, and what it has touched."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.parallel.ranks import Ranks
from meft_engine.planner import BYTES_PER_TRAINED_PARAMETER
from meft_engine.zero_parameters import full_shape

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

logger = logging.getLogger("meft_engine")


def make_report(attached: AttachedAdapters, optimizer: SparseCPUAdam) -> dict[str, Any]:
    """Figures of the adapter.

    Returns:
        ``adapter_parameters``, ``base_parameters``: elements. ``rows``, ``layers``.
        ``touched_share``: mean share of a layer's rows that a training micro-batch activates; ``kept_mass``: share of
        their activation that the cap kept. Both ``None`` before the first training micro-batch.
        ``host_bytes``: allocated on the host for rows and their optimizer state; ``host_bytes_measured``: what the
        process's resident memory grew by when they were allocated.
        ``stale_reads``: share of the reads of a table that missed its last update (0 unless ``max_staleness`` is 1).
        ``device_bytes``: what the compute device needs at hand, and ``device_bytes_by_kind``: ``routers`` with their
        Adam state, ``keys``, ``slots`` of rows that visit (where device and host are one: the largest gather),
        ``gradient_slots``, ``hot_rows`` that the device owns and ``gradients`` on their way to the host.
        ``dense_device_bytes``: what a dense adapter of the same size, trained by Adam, would hold there.
        ``traffic``: bytes that have crossed, ``values_to_device`` (and keys that visit), ``updates_to_device`` and
        ``gradients_to_host``, with their sums ``to_device_bytes`` and ``to_host_bytes``; ``hits`` and ``misses``, rows
        that were asked for while they were there, and while they were not.
    """
    tables = attached.tables()
    stats = [adapter.stats for adapter in attached.adapters.values()]
    seen = sum(s.micro_batches for s in stats)
    rows = attached.config.adapter.rows
    masses = [s.mass for s in stats if s.mass is not None]
    mass = torch.stack(masses).sum(0).tolist() if masses else [0.0, 0.0]
    rows_parameters = sum(table.handle.numel() for table in tables)
    router_parameters = sum(math.prod(full_shape(adapter.router)) for adapter in attached.adapters.values())
    reads = sum(table.updates.reads for table in tables)
    on_host, by_kind = host_bytes_by_kind(attached, optimizer), device_bytes_by_kind(attached)
    return {
        "layers": len(stats),
        "rows": rows,
        "adapter_parameters": rows_parameters + router_parameters,
        "base_parameters": attached.base_parameters,
        "touched_share": sum(int(s.active_rows) for s in stats) / (seen * rows) if seen else None,
        "kept_mass": (mass[1] / mass[0] if mass[0] > 0 else 1.0) if seen else None,
        "host_bytes": sum(on_host.values()),
        "host_bytes_measured": attached.measured_bytes,
        "stale_reads": sum(table.updates.stale_reads for table in tables) / reads if reads else 0.0,
        "device_bytes": sum(by_kind.values()),
        "device_bytes_by_kind": by_kind,
        "dense_device_bytes": BYTES_PER_TRAINED_PARAMETER * rows_parameters,
        "traffic": _traffic(tables),
    }


def host_bytes_by_kind(attached: AttachedAdapters, optimizer: SparseCPUAdam) -> dict[str, int]:
    """Allocated on the host: ``rows``, and of the optimizer ``moments`` and ``steps``."""
    return {"rows": sum(table.host_bytes() for table in attached.tables()), **optimizer.host_bytes_by_kind()}


def device_bytes_by_kind(attached: AttachedAdapters) -> dict[str, int]:
    """What the compute device needs at hand, see :func:`make_report`."""
    adapters = list(attached.adapters.values())
    routers = sum(math.prod(full_shape(adapter.router)) for adapter in adapters)
    visiting = [table for a in adapters for table in (a.keys, a.values) if not table.resident]
    found = {
        "routers": BYTES_PER_TRAINED_PARAMETER * routers,
        "keys": sum(a.keys.device_bytes() for a in adapters if a.keys.resident),
        "slots": sum(table.device_bytes() for table in visiting),
        "gradient_slots": sum(a.gradient_slots.device_bytes() for a in adapters if a.gradient_slots is not None),
        "hot_rows": sum(hot.device_bytes() for hot in attached.hot_rows()),
        "gradients": 0,
    }
    for traffic in attached.traffic:
        for kind, taken in traffic.device_bytes().items():
            found[kind] += taken
    return found


def _traffic(tables: list[PartiallyOffloadedTensor]) -> dict[str, int]:
    values, updates = (
        sum(getattr(table, name) for table in tables) for name in ("bytes_to_device", "bytes_of_updates")
    )
    gradients = sum(table.bytes_to_host for table in tables)
    visits = [table.visits() for table in tables]
    return {
        "values_to_device": values,
        "updates_to_device": updates,
        "gradients_to_host": gradients,
        "to_device_bytes": values + updates,
        "to_host_bytes": gradients,
        "hits": sum(there for there, _ in visits),
        "misses": sum(brought for _, brought in visits),
    }


def training_figures(engine: MeftEngine) -> dict[str, Any]:
    """What a model card says of the training."""
    report = make_report(engine.meft_adapters, engine.row_optimizer)
    losses = [float(loss) for _, loss in engine.step_losses]
    figures = {
        "optimizer steps": engine.global_steps,
        "sequences": engine.global_samples,
        "loss of the last step": f"{losses[-1]:.4g}" if losses else None,
        "learning rate of the rows now": f"{engine.row_optimizer.param_groups[0]['lr']:.3g}",
        "optimizer of the rows": engine.meft_config.optimizer.mode,
        "rows that a micro-batch touches": report["touched_share"] and f"{100 * report['touched_share']:.1f} %",
        "ZeRO stage": engine.zero_optimization_stage(),
        "ranks": engine.ranks.size,
    }
    return {name: value for name, value in figures.items() if value is not None}


def describe(attached: AttachedAdapters, optimizer: SparseCPUAdam, ranks: Ranks) -> None:
    """Log in one line what has just been built, and the resolved block; with several ranks, how they share it."""
    report = make_report(attached, optimizer)
    logger.info(
        "MEFT adapter: %d layers × %d rows, %.1f M parameters (%.0f %% of the base), %.2f GiB on the host "
        "(resident memory grew by %.2f GiB)",
        report["layers"],
        report["rows"],
        report["adapter_parameters"] / 1e6,
        100 * report["adapter_parameters"] / max(1, report["base_parameters"]),
        report["host_bytes"] / 2**30,
        report["host_bytes_measured"] / 2**30,
    )
    logger.info("MEFT configuration: %s", attached.config.resolved())
    if ranks.size > 1:
        owned = attached.tables()[0].owned
        logger.info(
            "MEFT ranks: %s of %d on %d nodes owns rows %d to %d of every layer; %s",
            ranks.names[ranks.rank],
            ranks.size,
            len(ranks.nodes),
            owned.start,
            owned.stop - 1,
            ranks.cores.sentence,
        )
    if not attached.config.trains_routers:
        logger.warning(
            'adapter.gate = "none" and router.balance = "%s": the router gets no gradient, so routing stays as it was '
            "initialised",
            attached.config.router.balance,
        )
