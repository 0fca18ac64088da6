"""The rows' half of an optimizer step, around DeepSpeed's own half."""

from __future__ import annotations

from typing import Any

from meft_engine.joint_norm import JointNorm, clip_coefficient
from meft_engine.optim.sparse_adam import SparseCPUAdam


class RowStep:
    """Runs the rows' update around DeepSpeed's: ``begin`` before it, ``finish`` after it.

    Args:
        optimizer: of the rows. joint_norm: the bridge into DeepSpeed's optimizer.
        max_norm: gradient clipping, 0 for none. lr_scale: rows' lr over the user's.
    """

    def __init__(self, optimizer: SparseCPUAdam, joint_norm: JointNorm, max_norm: float, lr_scale: float) -> None:
        self.optimizer, self.joint_norm = optimizer, joint_norm
        self._max_norm, self._lr_scale = max_norm, lr_scale
        self._loss_scale = 1.0

    def begin(self, param_groups: list[dict[str, Any]], loss_scale: float) -> None:
        """Take what DeepSpeed's step is about to change: lr (its scheduler moves on) and the loss scale."""
        self.optimizer.follow(param_groups, self._lr_scale)
        self._loss_scale = loss_scale
        self.joint_norm.rows = self.optimizer.gradient_norm()
        self.joint_norm.before_step()

    def finish(self, applied: bool) -> float:
        """Update the touched rows if DeepSpeed applied its step, forget their gradients, and return the joint norm."""
        norm = self.joint_norm.result()
        if applied:
            self.optimizer.step(grad_scale=clip_coefficient(norm, self._max_norm) / self._loss_scale)
        self.optimizer.zero_grad()
        return norm
