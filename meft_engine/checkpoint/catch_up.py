"""Rows of a checkpoint in the mode "dense_equivalent", whose idle rows are not up to date as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from meft_engine.optim.history import StepHistory
from meft_kernels import planes
from meft_kernels.dispatch import row_passes
from meft_kernels.rows import RowTable, paired_moments

if TYPE_CHECKING:
    from meft_engine.adapter.attach import AttachedAdapters
    from meft_engine.checkpoint.rank_files import RankFiles


def catch_up(attached: AttachedAdapters, ranks: RankFiles) -> None:
    """Bring an adapter's rows to date with the moments and the history of steps that were saved with them."""
    groups = ranks.groups
    for adapter in attached.adapters.values():
        for table in (adapter.keys, adapter.values):
            group, everything = groups[table.name], slice(0, table.rows)
            history = StepHistory()
            history.load(ranks.tensor(f"group{group['index']}/history"))
            step, exp_avg, exp_avg_sq = (
                ranks.read(table.name, kind, everything) for kind in ("step", "exp_avg", "exp_avg_sq")
            )
            coast = history.coast(step, group["eps"])
            if coast is None:
                continue
            high, low = table.planes()[0], None
            if ranks.has(f"{table.name}/low"):
                low = ranks.read(table.name, "low", everything)
            if exp_avg.dtype == torch.bfloat16:
                exp_avg, exp_avg_sq = paired_moments(torch.stack((exp_avg_sq, exp_avg), dim=2))
            stored = RowTable(high, low, exp_avg, exp_avg_sq, step)
            rows = torch.arange(table.rows)
            found = row_passes().read_coasted(stored, rows, coast, group["eps"], threads=table.threads)
            # Rounded as training would have read it.
            table.fill(planes.split(found)[0] if low is not None else found)
