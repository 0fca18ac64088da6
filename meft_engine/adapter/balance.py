"""Keeping experts in use: an auxiliary loss or a bias rule for their load, and a loss on the router's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meft_engine.config import RouterConfig


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """[N] float32: how many tokens chose each expert, of ``experts`` [T, n]."""
    ones = torch.ones(experts.numel(), device=experts.device)
    return torch.zeros(num_experts, device=experts.device).index_add_(0, experts.flatten(), ones)


def balance_loss(logits: Tensor, load: Tensor) -> Tensor:
    """``N Σ_e f_e P_e`` of one layer and micro-batch: 1 where load is even, up to N where one expert gets all.

    f_e is an expert's share of all choices, P_e its mean probability, which carries the gradient. Source: Switch
    Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6, with n choices a token in place of one.

    Args:
        logits: [T, N] float32 of the router. load: [N], of :func:`expert_load`.
    """
    probabilities = torch.softmax(logits, dim=-1).mean(0)
    return logits.shape[1] * (load / load.sum() * probabilities).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)²``, which keeps logits [T, N] small.

    Source: ST-MoE, https://arxiv.org/abs/2202.08906, equation 5.
    """
    return torch.logsumexp(logits, dim=-1).square().mean()


def auxiliary_loss(config: RouterConfig, logits: Tensor, load: Tensor) -> Tensor | None:
    """What the block adds to the training loss for one layer and micro-batch; ``None`` for nothing."""
    if not logits.shape[0]:
        return None  # padding alone
    parts = []
    if config.balance == "loss":
        parts.append(config.balance_coef * balance_loss(logits, load))
    if config.z_loss_coef:
        parts.append(config.z_loss_coef * z_loss(logits))
    return sum(parts) if parts else None


def rebalance(bias: Tensor, load: Tensor, rate: float) -> None:
    """Make experts that got less than the mean load more likely by ``rate``, and others less, in place.

    Source: auxiliary-loss-free balancing, https://arxiv.org/abs/2408.15664, algorithm 1.

    Args:
        bias: [N], added to logits for the choice of experts alone. load: [N], of one optimizer step.
    """
    bias.add_(torch.sign(load.mean() - load), alpha=rate)


class AddLoss(torch.autograd.Function):
    """Passes ``y`` on as it is, and has ``loss`` differentiated as if it were added to the training loss.

    It needs no access to that loss, and is right where layers are checkpointed: what is recomputed is what backward
    uses. ``scale()`` is asked in the backward for what the training loss has been multiplied by (loss scale, 1 over
    accumulation steps).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Callable[[], float]) -> Tensor:
        ctx.scale, ctx.like = scale, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_y, torch.full((), ctx.scale(), dtype=ctx.like, device=grad_y.device), None
