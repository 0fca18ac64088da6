"""`SparseCPUAdam`: AdamW that reads and writes only the rows that were touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from meft_engine.offload.memory import host_zeros
from meft_engine.offload.tensor import PartiallyOffloadedTensor

# Rows are updated in blocks of about this many elements, so that a block's temporaries stay in the cache.
_BLOCK_ELEMENTS = 1 << 17


class SparseCPUAdam(torch.optim.Optimizer):
    """AdamW over the touched rows of partially offloaded tensors ("lazy": a row ages only when it is touched).

    Every row counts its own steps, so its bias correction is that of its own history. A row that received no gradient
    is neither read nor written: its moments do not decay and its weights are not decayed. For a row at its t-th touch:

        m = β₁ m + (1 − β₁) g,  v = β₂ v + (1 − β₂) g²
        w = (1 − lr · λ) w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

    which is AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, algorithm 2) as torch.optim.AdamW has it.

    Args:
        tables: tensors, or groups ``{"tables": [...], "lr": ..., ...}`` as torch's optimizers take parameter groups.
        lr, betas, eps, weight_decay: AdamW's, for groups that do not say otherwise.

    State of a table: ``step`` [r] int32, ``exp_avg`` and ``exp_avg_sq`` [r, d] float32, on the host.
    """

    def __init__(
        self,
        tables: Iterable[PartiallyOffloadedTensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        groups = list(tables)
        if groups and not isinstance(groups[0], dict):
            groups = [{"tables": groups}]
        self._table_of: dict[int, PartiallyOffloadedTensor] = {}
        for group in groups:
            members = list(group.pop("tables"))
            group["params"] = [table.master for table in members]
            self._table_of.update((id(table.master), table) for table in members)
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for table in self.tables():
            self.state[table.master] = {
                "step": host_zeros((table.rows,), torch.int32),
                "exp_avg": host_zeros(table.master.shape, torch.float32),
                "exp_avg_sq": host_zeros(table.master.shape, torch.float32),
            }

    def tables(self) -> list[PartiallyOffloadedTensor]:
        """All tables, in the order of the groups."""
        return [self._table_of[id(master)] for group in self.param_groups for master in group["params"]]

    def follow(self, param_groups: list[dict[str, Any]], lr_scale: float = 1.0) -> None:
        """Take lr (times ``lr_scale``), betas, eps and weight decay from another optimizer's groups.

        A group of this optimizer follows the group at its ``follows`` index.
        """
        for group in self.param_groups:
            leader = param_groups[group["follows"]]
            group.update({key: leader[key] for key in ("betas", "eps", "weight_decay")})
            group["lr"] = leader["lr"] * lr_scale

    def gradient_norm(self) -> float:
        """2-norm of all accumulated row gradients; not finite if any of them is not."""
        norms = [torch.linalg.vector_norm(g.grad) for t in self.tables() if (g := t.gradient()) is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)) if norms else 0.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated row gradients."""
        for table in self.tables():
            table.clear_gradient()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: float = 1.0) -> float | None:
        """Update the rows that have a gradient, times ``grad_scale`` (loss unscaling and clipping in one factor)."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for master in group["params"]:
                table = self._table_of[id(master)]
                gradient = table.gradient()
                if gradient is not None:
                    self._update(table, gradient.rows, gradient.grad, group, grad_scale)
        return loss

    def _update(
        self, table: PartiallyOffloadedTensor, rows: Tensor, grad: Tensor, group: dict[str, Any], grad_scale: float
    ) -> None:
        state, (beta1, beta2) = self.state[table.master], group["betas"]
        lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
        steps = state["step"].index_select(0, rows) + 1
        state["step"].index_copy_(0, rows, steps)
        # Bias corrections in float64: 1 - β₂ᵗ is 1e-3 at the first step, where float32 would lose four digits.
        t = steps.double()[:, None]
        step_size = (lr / (1 - beta1**t)).float()
        root_correction = (1 - beta2**t).sqrt().float()
        block = max(1, _BLOCK_ELEMENTS // table.width)
        for chunk in (slice(start, start + block) for start in range(0, rows.numel(), block)):
            ids = rows[chunk]
            g = grad[chunk] * grad_scale if grad_scale != 1.0 else grad[chunk]
            m = state["exp_avg"].index_select(0, ids).lerp_(g, 1 - beta1)
            v = state["exp_avg_sq"].index_select(0, ids).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            state["exp_avg"].index_copy_(0, ids, m)
            state["exp_avg_sq"].index_copy_(0, ids, v)
            denominator = v.sqrt_().div_(root_correction[chunk]).add_(eps)
            w = table.master.index_select(0, ids)
            if decay:
                w.mul_(1 - lr * decay)
            w.sub_(m.mul_(step_size[chunk]).div_(denominator))
            table.master.index_copy_(0, ids, w)
        table.publish(rows)

    def host_bytes(self) -> int:
        """Bytes of the optimizer's state on the host."""
        return sum(value.nbytes for state in self.state.values() for value in state.values())
