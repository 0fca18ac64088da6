"""The passes of the adapter behind one call, whichever implementation is the fastest on a device.

Passes over tokens are there three times: in Triton for GPUs, compiled for this machine's CPU, and in PyTorch
for everything else. Passes over tables on the host are there twice: compiled, and in PyTorch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

from meft_kernels import owned, rows, slots, sparse
from meft_kernels.cpu import build, native_rows, native_sparse
from meft_kernels.sparse import Chosen, GradientPlaces, Inputs, Overflow, PickGradients, RowsAt, Selection

logger = logging.getLogger("meft_engine")

__all__ = [
    "Chosen",
    "GradientPlaces",
    "Inputs",
    "Overflow",
    "PickGradients",
    "RowsAt",
    "Selection",
    "owned_passes",
    "reads_host",
    "row_passes",
    "slot_passes",
    "token_passes",
]


def row_passes() -> ModuleType:
    """The module whose ``adam_rows``, ``gather_rows`` and so on are the fastest here; see ``kernels/rows.py``."""
    return native_rows if build.library() is not None else rows


def token_passes(device: torch.device) -> ModuleType:
    """The module whose ``choose_experts``, ``choose_rows`` and so on are the fastest there; see ``kernels/sparse.py``.

    ``MEFT_TOKEN_PASSES`` chooses: ``auto`` (the default: on a GPU those in Triton, if a small layer that is tried first
    comes out as in PyTorch), ``triton`` (which takes ``TRITON_INTERPRET=1`` on a CPU) or ``torch``.

    Raises:
        ValueError: if it is something else.
    """
    asked = _asked()
    if asked == "triton" or reads_host(device):
        # Not before it is needed: where there is no GPU there may be no Triton.
        from meft_kernels.triton import passes

        return passes
    return native_sparse if asked == "auto" and device.type == "cpu" and build.library() is not None else sparse


def slot_passes(device: torch.device) -> ModuleType:
    """The module whose ``gather`` brings rows to slots there without being waited for; see ``kernels/slots.py``."""
    if _asked() == "triton" or reads_host(device):
        from meft_kernels.triton import gather

        return gather
    return slots


def owned_passes(device: torch.device) -> ModuleType:
    """The module whose ``adam_rows`` updates rows that the device owns; see ``kernels/owned.py``."""
    if reads_host(device):
        from meft_kernels.triton import adam

        return adam
    return owned


def reads_host(device: torch.device) -> bool:
    """Whether kernels there can read pinned memory of the host in place: those in Triton, on a GPU."""
    asked = _asked()
    return device.type == "cuda" and (asked == "triton" or (asked == "auto" and _triton_works(device)))


def _asked() -> str:
    asked = os.environ.get("MEFT_TOKEN_PASSES", "auto")
    if asked not in ("auto", "triton", "torch"):
        raise ValueError(f'MEFT_TOKEN_PASSES = "{asked}" is none of "auto", "triton" and "torch"')
    return asked


@cache
def _triton_works(device: torch.device) -> bool:
    """Says so, once, where it does not."""
    reason = "Triton is not installed"
    if importlib.util.find_spec("triton"):
        from meft_kernels.triton.check import fault

        reason = fault(device)
    if reason is not None:
        logger.warning(f"MEFT computes on {device} in PyTorch, which is slower than its Triton kernels: {reason}")
    return reason is None
