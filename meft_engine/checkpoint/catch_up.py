"""Rows of a checkpoint in the mode "dense_equivalent", whose idle rows are not up to date as they are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from meft_engine.optim.history import StepHistory
from meft_kernels import planes
from meft_kernels.dispatch import row_passes
from meft_kernels.rows import RowTable, paired_moments

if TYPE_CHECKING:
    from meft_engine.adapter.attach import AttachedAdapters


def catch_up(attached: AttachedAdapters, optimizer_file: Path, weights_file: Path) -> None:
    """Bring an adapter's rows to date with the moments and the history of steps that were saved with them."""
    with safe_open(optimizer_file, "pt") as state, safe_open(weights_file, "pt") as weights:
        groups = json.loads(state.metadata()["groups"])
        names = set(weights.keys())
        for adapter in attached.adapters.values():
            for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
                group = groups[table.name]
                history = StepHistory()
                history.load(state.get_tensor(f"group{group['index']}/history"))
                step, exp_avg, exp_avg_sq = (
                    state.get_tensor(f"{table.name}/{key}") for key in ("step", "exp_avg", "exp_avg_sq")
                )
                coast = history.coast(step, group["eps"])
                if coast is None:
                    continue
                high, low = weights.get_tensor(f"{adapter.name}.{kind}"), None
                if f"{adapter.name}.{kind}_low" in names:
                    low = weights.get_tensor(f"{adapter.name}.{kind}_low")
                rows = torch.arange(table.rows)
                if exp_avg.dtype == torch.bfloat16:
                    exp_avg, exp_avg_sq = paired_moments(torch.stack((exp_avg_sq, exp_avg), dim=2))
                stored = RowTable(high, low, exp_avg, exp_avg_sq, step)
                found = row_passes().read_coasted(stored, rows, coast, group["eps"], threads=table.threads)
                # Rounded as training would have read it.
                table.fill(planes.split(found)[0] if low is not None else found)
