"""What an adapter needs and whether it fits, worked out before anything is allocated."""

from __future__ import annotations

import psutil
import torch

from meft_engine.config import MeftConfig, MeftConfigError

_GIB = 1 << 30


def host_bytes_needed(
    config: MeftConfig, layers: int, width: int, *, compute_dtype: torch.dtype, trainable: bool
) -> int:
    """Bytes of host memory that the rows of ``layers`` layers of this ``width`` take.

    Counted: masters (in bf16 as two planes, of which one is the compute copy), and where trainable two moments and an
    int32 step a row; for inference, the compute copies alone. Gradients in flight come on top; they follow the touched
    rows.
    """
    elements = layers * 2 * config.adapter.rows * width
    moment = {"fp32": 4, "bf16": 2}[config.optimizer.moments_dtype]
    an_element = 4 + 2 * moment if trainable else compute_dtype.itemsize
    return elements * an_element + (layers * 2 * config.adapter.rows * 4 if trainable else 0)


def require_host_memory(needed: int, config: MeftConfig, layers: int) -> None:
    """Refuse what does not fit.

    Raises:
        MeftConfigError: with the bytes needed, the bytes available and the number of rows that would fit.
    """
    available = psutil.virtual_memory().available
    if needed > available:
        fitting = config.adapter.rows * available // needed
        raise MeftConfigError(
            f"adapter.rows = {config.adapter.rows} in {layers} layers needs {needed / _GIB:.1f} GiB of host memory, "
            f"and {available / _GIB:.1f} GiB are available; at most about {fitting} rows would fit"
        )
