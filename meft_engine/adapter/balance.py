"""Keeping experts in use: an auxiliary loss or a bias rule for their load, and a loss on the router's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_engine.config import RouterConfig


def balance_loss(logits: Tensor, load: Tensor) -> Tensor:
    """``N Σ_e f_e P_e`` of one layer and micro-batch: 1 where load is even, up to N where one expert gets all.

    f_e is an expert's share of all choices, P_e its mean probability, which carries the gradient. Source: Switch
    Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6, with n choices a token in place of one.

    Args:
        logits: [T, N] float32 of the router. load: [N], how many tokens chose each expert.
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


def auxiliary_gradient(config: RouterConfig, logits: Tensor, load: Tensor) -> Tensor | None:
    """[T, N]: the gradient of :func:`auxiliary_loss` by the logits, in closed form; ``None`` where there is no loss.

    It is asked for in the backward alone, so that nobody has to add that loss to the model's, and it is right where
    layers are checkpointed.
    """
    if not config.adds_losses or not logits.shape[0]:
        return None
    tokens, num_experts = logits.shape
    probabilities = torch.softmax(logits, dim=-1)
    slope = torch.zeros_like(probabilities)
    if config.balance == "loss":
        share = load / load.sum()
        slope += (share - (probabilities @ share)[:, None]) * (config.balance_coef * num_experts / tokens)
    if config.z_loss_coef:
        slope += torch.logsumexp(logits, dim=-1, keepdim=True) * (2 * config.z_loss_coef / tokens)
    return slope.mul_(probabilities)


def rebalance(bias: Tensor, load: Tensor, rate: float) -> None:
    """Make experts that got less than the mean load more likely by ``rate``, and others less, in place.

    Source: auxiliary-loss-free balancing, https://arxiv.org/abs/2408.15664, algorithm 1.

    Args:
        bias: [N], added to logits for the choice of experts alone. load: [N], of one optimizer step.
    """
    bias.add_(torch.sign(load.mean() - load), alpha=rate)
