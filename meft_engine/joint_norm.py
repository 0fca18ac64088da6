"""One gradient norm over DeepSpeed's parameters and the adapter's rows, in each of DeepSpeed's optimizers.

DeepSpeed clips by the norm of the parameters that it owns. For the joint norm to rule both sides, the rows' norm has to
enter where each optimizer computes or uses its own; and a rows' norm that is not finite has to skip its step too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meft_engine.config import MeftConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


class JointNorm(ABC):
    """Base of the bridges. ``rows`` is the rows' norm of the step at hand, in the units of the scaled loss."""

    rows: float = 0.0

    def before_step(self) -> None:  # noqa: B027 - most have nothing to do
        """Called once a step, when ``rows`` is known and before DeepSpeed steps."""

    @abstractmethod
    def result(self) -> float:
        """The joint norm of the step that DeepSpeed has just taken, unscaled; infinite if it was skipped for it."""

    def combine(self, own: Any) -> Any:
        """√(own² + rows²), of the type of ``own``; a negative ``own``, by which DeepSpeed says "invalid", stays."""
        if not isinstance(own, Tensor):
            return math.hypot(own, self.rows) if own >= 0 else own
        joint = torch.hypot(own, torch.full_like(own, self.rows))
        return torch.where(own >= 0, joint, own)


class PlainJointNorm(JointNorm):
    """Stage 0 in fp32: the engine holds a bare optimizer, which knows neither norms nor skipped steps."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine, self._norm = engine, 0.0

    def before_step(self) -> None:
        self._norm = float(self.combine(torch.linalg.vector_norm(torch.stack(self._norms()))))
        finite = math.isfinite(self._norm)
        # The engine reads this attribute of any optimizer that has it, and then counts the step as skipped.
        self._engine.optimizer.overflow = not finite
        if not finite:
            self._engine.zero_grad()

    def clip(self) -> None:
        """Scale DeepSpeed's gradients by the joint norm's coefficient."""
        coefficient = clip_coefficient(self._norm, self._engine.gradient_clipping())
        if coefficient < 1.0:
            for parameter in self._engine.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)

    def result(self) -> float:
        return self._norm if math.isfinite(self._norm) else math.inf

    def _norms(self) -> list[Tensor]:
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return [torch.linalg.vector_norm(g.float()) for g in grads] or [torch.zeros(())]


class HalfPrecisionJointNorm(JointNorm):
    """Stage 0 in bf16: ``FP16_Optimizer`` and ``FP16_UnfusedOptimizer``."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        original = self._optimizer.unscale_and_clip_grads
        self._applied_norm: Any = math.inf

        def unscale_and_clip_grads(*args: Any, **kwargs: Any) -> Any:
            # The fused form passes (grads, norm), the unfused one (norm); the norm is the last positional argument.
            self._applied_norm = self.combine(args[-1])
            return original(*args[:-1], self._applied_norm, **kwargs)

        self._optimizer.unscale_and_clip_grads = unscale_and_clip_grads

    def before_step(self) -> None:
        self._applied_norm = math.inf
        if not math.isfinite(self.rows):
            # DeepSpeed looks for overflow in its own gradients, which are discarded with the step.
            for parameter in self._engine.module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, math.nan)

    def result(self) -> float:
        return float(self._applied_norm)


class ZeroJointNorm(JointNorm):
    """ZeRO stages 1 and 2: ``DeepSpeedZeroOptimizer``."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._optimizer = engine.optimizer
        # bf16 would step with a norm that is not finite where the user turned this off.
        self._optimizer.check_grad_overflow = True
        original = self._optimizer.scaled_global_norm
        self._optimizer.scaled_global_norm = lambda *args, **kwargs: self.combine(original(*args, **kwargs))

    def result(self) -> float:
        return float(self._optimizer._global_grad_norm)


class Stage3JointNorm(JointNorm):
    """ZeRO stage 3: ``DeepSpeedZeroOptimizer_Stage3``, which combines its groups' norms and skips what is infinite."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._optimizer = engine.optimizer
        original = self._optimizer._get_norm_groups

        def norm_groups() -> list[Tensor]:
            own = original()
            return [*own, torch.full_like(own[0], self.rows)]

        self._optimizer._get_norm_groups = norm_groups

    def result(self) -> float:
        return float(self._optimizer._global_grad_norm)


def install_joint_norm(engine: DeepSpeedEngine) -> JointNorm:
    """The bridge for the optimizer that DeepSpeed has built.

    Raises:
        MeftConfigError: if it is one into which no joint norm can be brought.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # By the exact class: those derived from them (ZenFlow's, SuperOffload's) step in ways of their own.
    bridges: dict[type, type[JointNorm]] = {
        DeepSpeedZeroOptimizer_Stage3: Stage3JointNorm,
        DeepSpeedZeroOptimizer: ZeroJointNorm,
        FP16_Optimizer: HalfPrecisionJointNorm,
        FP16_UnfusedOptimizer: HalfPrecisionJointNorm,
    }
    bridge = bridges.get(type(engine.optimizer))
    if bridge is None and engine.optimizer is engine.basic_optimizer:
        bridge = PlainJointNorm
    if bridge is None:
        raise MeftConfigError(
            f"DeepSpeed chose {type(engine.optimizer).__name__}, which MEFT does not support; use a ZeRO stage from 0 "
            "to 3 without ZenFlow or SuperOffload"
        )
    return bridge(engine)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` and DeepSpeed have it; 0 disables."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
