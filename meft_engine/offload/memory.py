"""Host memory of exactly the size asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def host_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in an anonymous mapping of their own.

    Every page is really there when this returns, so that memory runs out here or never, and it goes back to the system
    when the tensor dies. torch's own allocator would place tables in whatever memory the process had freed before.
    """
    bytes_needed = max(1, math.prod(shape) * dtype.itemsize)
    mapping = mmap.mmap(-1, bytes_needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape)).view(*shape).fill_(0)
