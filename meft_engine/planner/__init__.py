"""What an adapter needs and whether it fits, worked out before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.offload.returning import MOST_UNDER_WAY
from meft_engine.offload.slots import slot_set_bytes

_GIB = 1 << 30


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
    """Bytes of a node's host memory that the rows of ``layers`` layers of this ``width`` take.

    Counted: masters (in bf16 as two planes, of which one is the compute copy), and where trainable two moments and an
    int32 step a row; for inference, the compute copies alone. Gradients in flight come on top; they follow the touched
    rows. With several ranks a node holds every compute copy once, and of the rest the part that its ranks own (all of
    it where ``optimizer.mode`` is ``"dense_equivalent"``).
    """
    elements = layers * 2 * config.adapter.rows * width
    if not trainable:
        return elements * compute_dtype.itemsize
    moment = {"fp32": 4, "bf16": 2}[config.optimizer.moments_dtype]
    own = elements * (4 - compute_dtype.itemsize + 2 * moment) + layers * 2 * config.adapter.rows * 4
    if config.optimizer.mode != "dense_equivalent":
        own = own * ranks_of_node // ranks
    return elements * compute_dtype.itemsize + own


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


def snapshot_bytes_needed(config: MeftConfig, needed: int, ranks_of_node: int) -> int:
    """Bytes of a node's host memory for copies of rows during saves in the background, where the block says how many;
    never more than the rows take (``needed``)."""
    saving = config.checkpoint
    return min(needed, ranks_of_node * saving.snapshot_bytes) if saving.async_save and saving.snapshot_bytes else 0


def require_host_memory(needed: int, config: MeftConfig, layers: int, *, copies: int = 0) -> None:
    """Refuse what does not fit: ``needed`` bytes for rows and ``copies`` of them during saves.

    Raises:
        MeftConfigError: with the bytes needed, the bytes available and the number of rows that would fit.
    """
    available = psutil.virtual_memory().available
    if needed + copies > available:
        fitting = config.adapter.rows * max(0, available - copies) // needed
        besides = f" besides {copies / _GIB:.1f} GiB for checkpoint.snapshot_bytes" if copies else ""
        raise MeftConfigError(
            f"adapter.rows = {config.adapter.rows} in {layers} layers needs {needed / _GIB:.1f} GiB of host memory"
            f"{besides}, and {available / _GIB:.1f} GiB are available; at most about {fitting} rows would fit"
        )


# A router's weights and gradient in 16 bits, its fp32 master and two moments.
BYTES_PER_TRAINED_PARAMETER = 16


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family, as far as memory goes."""

    layers: int
    width: int
    intermediate: int
    """Width of the FFNs."""
    vocabulary: int
    parameters: int
    """Elements of the base."""


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
    pools = 1 if keys_on_device else 2
    budget = None if offload.slot_bytes is None else offload.slot_bytes // pools
    own = layers if budget is None else min(layers, budget // max(1, most * row_bytes))
    shared = min(2, layers - own)
    return {
        "routers": layers * adapter.resolved_num_experts * width * BYTES_PER_TRAINED_PARAMETER,
        "keys": layers * adapter.rows * _key_bytes(config, width, compute_dtype) if keys_on_device else 0,
        "slots": pools * (own + shared) * slot_set_bytes(adapter.rows, most, row_bytes),
        "gradient_slots": layers * gradient_slots_of_layer(config, layers, width) * 2 * width * 4,
        "hot_rows": hot_rows_bytes(config, layers, width),
        # Those of the layer that comes next are there when the first is waited for.
        "gradients": (min(MOST_UNDER_WAY, 2 * layers) + 2) * most * width * 4,
    }


def most_active_rows(config: MeftConfig, tokens: int) -> int:
    """The most rows that a micro-batch of so many tokens can activate in a layer."""
    most = min(config.adapter.rows, tokens * config.adapter.top_k)
    return min(most, config.active_rows.cap or most)


def _key_bytes(config: MeftConfig, width: int, compute_dtype: torch.dtype) -> int:
    """Of a row of the keys on the device."""
    return width + 4 if config.offload.keys_dtype == "int8" else width * compute_dtype.itemsize


def base_bytes_needed(model: ModelShape, tokens: int) -> dict[str, int]:
    """Bytes of device memory that a frozen base in bf16 takes in a forward and backward, without checkpointing.

    Counted is what autograd keeps of a layer where weights need no gradient: fp32 inputs of both norms, queries, keys,
    values, output and log-sum of attention, gate (before and after its activation) and up projection; what an adapter
    keeps besides, its input; and at the end the norm, logits and their gradient, in bf16 and in fp32. Attention must be
    one that forms no matrix of scores.

    Args:
        tokens: of a micro-batch.
    """
    of_layer = 2 * 4 * model.width + 4 * 2 * model.width + 3 * 2 * model.intermediate + 2 * model.width
    of_end = 4 * model.width + (2 + 4 + 4 + 2) * model.vocabulary
    return {
        "base": 2 * model.parameters,
        "activations": tokens * (model.layers * of_layer + of_end),
    }
