"""What an adapter needs and whether it fits, worked out before anything is allocated."""

from __future__ import annotations

import psutil
import torch

from meft_engine.config import MeftConfig, MeftConfigError

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
