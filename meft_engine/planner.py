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

    Counted: fp32 masters, the compute copies where they are a second table, and (where trainable) two fp32 moments and
    an int32 step a row. Gradients in flight come on top; they follow the touched rows.
    """
    elements = layers * 2 * config.adapter.rows * width
    an_element = 4 + (0 if compute_dtype == torch.float32 else compute_dtype.itemsize) + (8 if trainable else 0)
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
