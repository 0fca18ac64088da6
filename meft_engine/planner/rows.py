"""What rows, their optimizer state and their visits to a device take, in bytes."""

from __future__ import annotations

import math

import torch

from meft_engine.config import MeftConfig
from meft_engine.offload.returning import MOST_UNDER_WAY
from meft_engine.offload.slots import slot_set_bytes

BYTES_PER_TRAINED_PARAMETER = 16
"""A router's weights and gradient in 16 bits, its fp32 master and two moments; in fp32 as many."""


def host_rows_by_kind(
    config: MeftConfig,
    layers: int,
    width: int,
    *,
    compute_dtype: torch.dtype,
    trainable: bool = True,
    ranks: int = 1,
    ranks_of_node: int = 1,
) -> dict[str, int]:
    """Bytes of a node's host memory that the rows of ``layers`` layers of this ``width`` take, by kind.

    Returns:
        ``compute_copies`` (in fp32 the masters themselves), ``lower_planes`` of masters (0 in fp32), ``moments`` and
        ``steps``, an int32 for each row of a table. For inference only the first is not 0. With several ranks a node
        holds every compute copy once, and of the rest the part that its ranks own (all of it where ``optimizer.mode``
        is ``"dense_equivalent"``).
    """
    rows = layers * 2 * config.adapter.rows
    elements = rows * width
    moment = {"fp32": 4, "bf16": 2}[config.optimizer.moments_dtype]
    own = {"lower_planes": elements * (4 - compute_dtype.itemsize), "moments": elements * 2 * moment, "steps": rows * 4}
    shared = config.optimizer.mode == "dense_equivalent"
    share = (1, 1) if shared else (ranks_of_node, ranks)
    return {
        "compute_copies": elements * compute_dtype.itemsize,
        **{kind: count * share[0] // share[1] if trainable else 0 for kind, count in own.items()},
    }


def host_bytes_needed(
    config: MeftConfig,
    layers: int,
    width: int,
    *,
    compute_dtype: torch.dtype,
    trainable: bool,
    ranks: int = 1,
    ranks_of_node: int = 1,
) -> int:
    """The sum of :func:`host_rows_by_kind`. Gradients in flight come on top; they follow the touched rows."""
    kinds = host_rows_by_kind(
        config,
        layers,
        width,
        compute_dtype=compute_dtype,
        trainable=trainable,
        ranks=ranks,
        ranks_of_node=ranks_of_node,
    )
    return sum(kinds.values())


def snapshot_bytes_needed(config: MeftConfig, needed: int, ranks_of_node: int) -> int:
    """Bytes of a node's host memory for copies of rows during saves in the background, where the block says how many;
    never more than the rows take (``needed``)."""
    saving = config.checkpoint
    return min(needed, ranks_of_node * saving.snapshot_bytes) if saving.async_save and saving.snapshot_bytes else 0


def gradient_slots_of_layer(config: MeftConfig, layers: int, width: int) -> int:
    """How many rows of a layer can keep their gradients on the device: fp32, of keys and of values."""
    return min(config.adapter.rows, (config.offload.grad_slot_bytes or 0) // (layers * 2 * width * 4))


def hot_rows_of_layer(config: MeftConfig, layers: int, width: int) -> int:
    """How many rows of a layer the device can own: of keys and of values master, moments and gradient, and a step."""
    moment = {"fp32": 4, "bf16": 2}[config.optimizer.moments_dtype]
    return min(config.adapter.rows, config.offload.resident_bytes // (layers * _hot_row_bytes(width, moment)))


def _hot_row_bytes(width: int, moment: int) -> int:
    return 2 * (width * (4 + 2 * moment + 4) + 4)


def hot_rows_bytes(config: MeftConfig, layers: int, width: int) -> int:
    """Of all layers' rows that the device may own, with what says where they are and how much in use each row is."""
    most = hot_rows_of_layer(config, layers, width)
    moment = {"fp32": 4, "bf16": 2}[config.optimizer.moments_dtype]
    of_layer = most * (_hot_row_bytes(width, moment) + 8 + 1 + 1) + 1 + (config.adapter.rows + 1) * (4 + 4) + 2 * 4
    return layers * of_layer if most else 0


def device_bytes_needed(
    config: MeftConfig, layers: int, width: int, tokens: int, *, compute_dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of device memory that the adapters of ``layers`` layers take while they train, by kind.

    Returns:
        ``routers``, with gradients and optimizer state; ``keys``, where they live there; ``slots`` of rows that visit,
        with the tables that say where they are; ``gradient_slots``; ``hot_rows``, which the device owns; ``gradients``,
        on their way to the host, at most.

    Args:
        width: of a row. tokens: of a micro-batch.
    """
    adapter, offload = config.adapter, config.offload
    most = most_active_rows(config, tokens)
    row_bytes = width * compute_dtype.itemsize
    keys_on_device = offload.keys == "device"
    # Values that an optimizer has left behind are brought to date on the host, and come anew for each pass.
    pools = (config.optimizer.mode == "lazy") + (not keys_on_device)
    own = layers_with_slots(config, layers, width, tokens, compute_dtype=compute_dtype)
    shared = min(2, layers - own)
    return {
        "routers": router_parameters(config, layers, width) * BYTES_PER_TRAINED_PARAMETER,
        "keys": layers * adapter.rows * key_bytes(config, width, compute_dtype) if keys_on_device else 0,
        "slots": pools * (own + shared) * slot_set_bytes(adapter.rows, most, row_bytes),
        "gradient_slots": layers * gradient_slots_of_layer(config, layers, width) * 2 * width * 4,
        "hot_rows": hot_rows_bytes(config, layers, width),
        # Those of the layer that comes next are there when the first is waited for.
        "gradients": (min(MOST_UNDER_WAY, 2 * layers) + 2) * most * width * 4,
    }


def layers_with_slots(config: MeftConfig, layers: int, width: int, tokens: int, *, compute_dtype: torch.dtype) -> int:
    """How many layers have slots of their own, in which rows stay from a forward to its backward."""
    offload = config.offload
    if offload.slot_bytes is None:
        return layers
    budget = offload.slot_bytes // (1 if offload.keys == "device" else 2)
    return min(layers, budget // max(1, most_active_rows(config, tokens) * width * compute_dtype.itemsize))


def router_parameters(config: MeftConfig, layers: int, width: int) -> int:
    """Elements of the routers of all layers."""
    return layers * config.adapter.resolved_num_experts * width


def most_active_rows(config: MeftConfig, tokens: int) -> int:
    """The most rows that a micro-batch of so many tokens can activate in a layer."""
    most = min(config.adapter.rows, tokens * config.adapter.top_k)
    return min(most, config.active_rows.cap or most)


def key_bytes(config: MeftConfig, width: int, compute_dtype: torch.dtype) -> int:
    """Of a row of the keys on the device."""
    return width + 4 if config.offload.keys_dtype == "int8" else width * compute_dtype.itemsize


_USE_FACTOR, _USE_POWER = 0.54, 0.82


def touched_rows(config: MeftConfig, tokens: int, *, share: float | None = None, micro_batches: int = 1) -> float:
    """How many rows of a layer so many micro-batches of so many tokens touch together, by estimate.

    The share is 1 − exp(−0.54 x^0.82), x = T · K / r being the picks of each row. Were rows alike, factor and power
    would be 1. This is within 0.04 of what SmolLM2-135M touched in ``benchmarks/results/step.csv`` where no cap binds,
    from 1,024 to 32,768 rows and 128 to 1,024 tokens, early in training.

    Args:
        share: that one micro-batch touches, where it is known.
    """
    rows = config.adapter.rows
    if share is None:
        share = 1 - math.exp(-_USE_FACTOR * (tokens * config.adapter.top_k / rows) ** _USE_POWER)
    share = min(share, (config.active_rows.cap or rows) / rows, 1.0)
    return rows * (1 - (1 - share) ** (micro_batches**_USE_POWER))
