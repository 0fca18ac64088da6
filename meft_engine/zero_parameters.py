"""Parameters that ZeRO stage 3 may have partitioned: their true size, and a look at the whole of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO stage 3 manages it, so that at most a part of it is here."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape that it has as a whole."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


@contextmanager
def gathered(parameters: Iterable[Tensor], *, modify: bool = False) -> Iterator[None]:
    """Make parameters whole inside the ``with``; all ranks have to enter it.

    Args:
        modify: keep what is written to them.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed import zero  # not at the top: inference goes without DeepSpeed

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield
