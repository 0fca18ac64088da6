"""Chooses the fastest implementation of each kernel that the device and the installation offer.

Passes over tokens and over host tables are there twice: compiled for this machine's CPU, and in PyTorch for every other
device and where there is no compiler.
"""

from __future__ import annotations

from types import ModuleType

import torch

from meft_kernels import rows, sparse
from meft_kernels.cpu import build, native_rows, native_sparse
from meft_kernels.sparse import Chosen, Inputs, Overflow, PickGradients, RowsAt, Selection

__all__ = ["Chosen", "Inputs", "Overflow", "PickGradients", "RowsAt", "Selection", "row_passes", "token_passes"]


def row_passes() -> ModuleType:
    """The module whose ``adam_rows``, ``gather_rows`` and so on are the fastest here; see ``kernels/rows.py``."""
    return native_rows if build.library() is not None else rows


def token_passes(device: torch.device) -> ModuleType:
    """The module whose ``choose_experts``, ``choose_rows`` and so on are the fastest there; see ``kernels/sparse.py``."""
    return native_sparse if device.type == "cpu" and build.library() is not None else sparse
