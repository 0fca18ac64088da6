"""Chooses the fastest implementation of each kernel that the device and the installation offer.

Routing and applying rows have one, the sparse PyTorch path, which runs on every device. Passes over host tables have
two: compiled for this machine, or in PyTorch where there is no compiler.
"""

from __future__ import annotations

from types import ModuleType

from meft_kernels import rows
from meft_kernels.cpu import native
from meft_kernels.sparse import (
    Overflow,
    Selection,
    TokensOfRow,
    combine_rows,
    route,
    score_experts,
    score_picks,
    select,
)

__all__ = [
    "Overflow",
    "Selection",
    "TokensOfRow",
    "combine_rows",
    "route",
    "row_passes",
    "score_experts",
    "score_picks",
    "select",
]


def row_passes() -> ModuleType:
    """The module whose ``adam_rows``, ``gather_rows`` and so on are the fastest here; see ``kernels/rows.py``."""
    return native if native.library() is not None else rows
