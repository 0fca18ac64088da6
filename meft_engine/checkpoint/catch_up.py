"""Rows of a checkpoint in the mode "dense_equivalent", whose idle rows are not up to date as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meft_kernels import planes
from meft_kernels.dispatch import row_passes
from meft_kernels.rows import RowTable, paired_moments

if TYPE_CHECKING:
    from meft_engine.checkpoint.saved_adapter import SavedAdapter


def current_rows(saved: SavedAdapter, ffn: str, kind: str, rows: slice) -> Tensor:
    """[n, d] float32: consecutive masters of a checkpoint, brought to date with the moments and the history of steps
    that were saved with them."""
    table = f"{ffn}/{kind}"
    shards, group = saved.shards, saved.groups[table]
    masters = saved.master_rows(ffn, kind, rows)
    step, exp_avg, exp_avg_sq = (shards.read(table, kind, rows) for kind in ("step", "exp_avg", "exp_avg_sq"))
    coast = saved.history(group["index"]).coast(step, group["eps"])
    if coast is None:
        return masters
    if exp_avg.dtype == torch.bfloat16:
        exp_avg, exp_avg_sq = paired_moments(torch.stack((exp_avg_sq, exp_avg), dim=2))
    stored = RowTable(masters, None, exp_avg, exp_avg_sq, step)
    found = row_passes().read_coasted(stored, torch.arange(len(masters)), coast, group["eps"], threads=1)
    # Rounded as training would have read it.
    return planes.split(found)[0].float() if shards.has(table, "low") else found
