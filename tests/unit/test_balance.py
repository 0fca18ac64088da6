"""The losses and the bias that keep experts in use, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from meft_engine.adapter.balance import (
    auxiliary_gradient,
    auxiliary_loss,
    balance_loss,
    rebalance,
    z_loss,
)
from meft_engine.config import RouterConfig


def logits_and_experts(tokens: int = 13, experts: int = 7, chosen: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(tokens, experts, generator=generator)
    return logits, logits.topk(chosen).indices


def load_of(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(experts.flatten(), minlength=num_experts).float()


def test_the_balance_loss_is_the_formula():
    logits, experts = logits_and_experts()
    expected = 0.0
    for e in range(7):
        share = sum(row.count(e) for row in experts.tolist()) / experts.numel()
        probability = sum(math.exp(row[e]) / sum(map(math.exp, row)) for row in logits.tolist()) / len(logits)
        expected += 7 * share * probability
    assert float(balance_loss(logits, load_of(experts, 7))) == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_is_1_at_even_load_and_N_at_collapse():
    even = torch.zeros(8, 8)
    assert float(balance_loss(even, torch.full((8,), 3.0))) == pytest.approx(1)
    collapsed = torch.full((8, 8), -40.0)
    collapsed[:, 2] = 40
    assert float(balance_loss(collapsed, load_of(torch.full((8, 1), 2), 8))) == pytest.approx(8)


def test_its_gradient_pushes_the_crowded_expert_down():
    logits = torch.zeros(6, 4, requires_grad=True)
    balance_loss(logits, torch.tensor([9.0, 1, 1, 1])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_formula():
    logits, _ = logits_and_experts()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / len(logits)
    assert float(z_loss(logits)) == pytest.approx(expected, rel=1e-5)


def test_the_block_says_what_is_added():
    logits, experts = logits_and_experts()
    load = load_of(experts, 7)
    assert auxiliary_loss(RouterConfig(balance="none"), logits, load) is None
    default = auxiliary_loss(RouterConfig(), logits, load)
    assert float(default) == pytest.approx(0.01 * float(balance_loss(logits, load)), rel=1e-6)
    assert auxiliary_loss(RouterConfig(balance="bias"), logits, load) is None
    both = auxiliary_loss(RouterConfig(balance="loss", balance_coef=0.5, z_loss_coef=0.25), logits, load)
    assert float(both) == pytest.approx(0.5 * float(balance_loss(logits, load)) + 0.25 * float(z_loss(logits)))
    assert auxiliary_loss(RouterConfig(balance="loss"), logits[:0], load * 0) is None, "of padding alone"


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.25])
@pytest.mark.parametrize("balance", ["none", "loss", "bias"])
def test_the_gradient_is_that_of_the_loss(balance, z_loss_coef):
    logits, experts = logits_and_experts()
    load = load_of(experts, 7)
    config = RouterConfig(balance=balance, balance_coef=0.5, z_loss_coef=z_loss_coef)
    leaf = logits.double().requires_grad_()
    loss, found = auxiliary_loss(config, leaf, load.double()), auxiliary_gradient(config, logits, load)
    assert (loss is None) == (found is None) == (balance != "loss" and not z_loss_coef)
    if loss is not None:
        loss.backward()
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-5, atol=1e-8)
    assert auxiliary_gradient(config, logits[:0], load * 0) is None, "of padding alone"


def test_the_bias_follows_the_load():
    bias = torch.tensor([0.5, 0, 0, 0])
    rebalance(bias, torch.tensor([0.0, 4, 9, 3]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.6, 0, -0.1, 0.1]))
