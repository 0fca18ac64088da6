"""Chooses the fastest implementation of each kernel that the device and the installation offer.

Today there is one, the sparse PyTorch path, which runs on every device.
"""

from __future__ import annotations

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
    "score_experts",
    "score_picks",
    "select",
]
