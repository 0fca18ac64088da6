"""Rows follow the caller's parameter groups and learning-rate schedulers, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LambdaLR

from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    largest_difference,
    lm_loss,
    masters,
    router_gradients,
    routers,
    row_gradients,
    tables,
)
from tests.integration.oracles import LazyAdamW

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def record_steps(engine) -> list[list[dict[str, Any]]]:
    """A list that gains, at each step of DeepSpeed's own optimizer, the settings of all its groups at that moment."""
    used = []

    def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # ZeRO steps one group at a time, through a list of just that group.
        if not used or used[-1][0] != engine.global_steps:
            used.append((engine.global_steps, []))
        for group in optimizer.param_groups:
            used[-1][1].append({key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})

    engine.basic_optimizer.register_step_pre_hook(record)
    return used


def follow(engine, steps: int, group_of, lr_scale: float = 1.0) -> list[list[float]]:
    """Train; require that the rows are where the oracle gets with the settings that DeepSpeed used at each step.

    Args:
        group_of: from a table's name to the index of the group that it has to follow.

    Returns:
        For every step, the learning rate of each group.
    """
    used, oracle = record_steps(engine), LazyAdamW(masters(engine))
    for step in range(steps):
        engine.backward(lm_loss(engine, batch(step, size=2, length=8)))
        touched = row_gradients(engine)
        assert touched.keys() == tables(engine).keys()
        engine.step()
        groups = used[-1][1]

        def settings(name: str, groups=groups) -> dict[str, Any]:
            group = groups[group_of(name)]
            return {**group, "lr": group["lr"] * lr_scale}

        oracle.step(touched, settings)
        assert largest_difference(masters(engine), oracle.weights) < 1e-5, f"step {step}"
    assert len(used) == steps
    return [[float(group["lr"]) for group in groups] for _, groups in used]


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


# --- schedulers

WARM_UP = {"warmup_min_lr": 1e-4, "warmup_max_lr": 2e-2, "warmup_num_steps": 4, "warmup_type": "linear"}


def sequence(optimizer: torch.optim.Optimizer) -> torch_schedules.LRScheduler:
    warm_up = torch_schedules.LinearLR(optimizer, 0.1, total_iters=3)
    return torch_schedules.SequentialLR(
        optimizer, [warm_up, torch_schedules.ExponentialLR(optimizer, 0.8)], milestones=[3]
    )


def chain(optimizer: torch.optim.Optimizer) -> torch_schedules.ChainedScheduler:
    parts = [torch_schedules.ConstantLR(optimizer, 0.3, total_iters=3), torch_schedules.ExponentialLR(optimizer, 0.8)]
    return torch_schedules.ChainedScheduler(parts)


SCHEDULES = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 0.7**step),
    "MultiplicativeLR": lambda optimizer: torch_schedules.MultiplicativeLR(optimizer, lambda step: 0.8),
    "StepLR": lambda optimizer: torch_schedules.StepLR(optimizer, 1, 0.5),
    "MultiStepLR": lambda optimizer: torch_schedules.MultiStepLR(optimizer, [1, 2, 4, 6], 0.5),
    "ExponentialLR": lambda optimizer: torch_schedules.ExponentialLR(optimizer, 0.7),
    "LinearLR": lambda optimizer: torch_schedules.LinearLR(optimizer, 0.1, total_iters=6),
    "PolynomialLR": lambda optimizer: torch_schedules.PolynomialLR(optimizer, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda optimizer: torch_schedules.CosineAnnealingLR(optimizer, T_max=6, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda optimizer: torch_schedules.CosineAnnealingWarmRestarts(optimizer, T_0=5),
    # These two cycle the betas too.
    "CyclicLR": lambda optimizer: torch_schedules.CyclicLR(optimizer, 1e-3, 2e-2, step_size_up=3),
    "OneCycleLR": lambda optimizer: torch_schedules.OneCycleLR(optimizer, max_lr=2e-2, total_steps=12),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "WarmupLR": {"type": "WarmupLR", "params": WARM_UP},
    "WarmupDecayLR": {"type": "WarmupDecayLR", "params": {**WARM_UP, "total_num_steps": 10}},
    "WarmupCosineLR": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 3, "total_num_steps": 10, "warmup_type": "linear"},
    },
    "LRRangeTest": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 1}},
    # It cycles the betas too.
    "OneCycle": {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 1e-3,
            "cycle_max_lr": 2e-2,
            "cycle_first_step_size": 3,
            "cycle_min_mom": 0.8,
            "cycle_max_mom": 0.95,
        },
    },
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_rows_learn_at_deepspeeds_rate_at_every_step(kind, stage):
    # A scheduler of the caller's is an argument, DeepSpeed's own stands at the top level of the JSON.
    where = "lr_scheduler" if callable(SCHEDULES[kind]) else "scheduler"
    block = tiny_block(optimizer={"lr_scale": 0.3})
    engine = build_engine(tiny_llama(), block, stage=stage, adam=ADAM, **{where: SCHEDULES[kind]})
    fill_values(engine.meft_adapters)
    rates = [rate for (rate,) in follow(engine, 8, lambda name: 0, lr_scale=0.3)]
    assert len(set(rates)) > 4, "the schedule must move, or nothing is tested"
    assert engine.lr_scheduler is not None


def test_no_scheduler_is_left_out():
    """ConstantLR is in the chain; ReduceLROnPlateau wants a metric, which no engine gives it."""
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    bases = {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau", "ConstantLR"}
    names = {n for n, c in vars(torch_schedules).items() if isinstance(c, type) and hasattr(c, "get_last_lr")} - bases
    assert len(names) >= 13 and names | set(VALID_LR_SCHEDULES) == SCHEDULES.keys()


def test_a_rate_set_by_hand_reaches_the_rows():
    """Training loops also write into `param_groups` themselves."""
    engine = build_engine(tiny_llama(), adam={**ADAM, "weight_decay": 0.0})
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    before = masters(engine)
    for step in range(2):
        engine.backward(lm_loss(engine, batch(step)))
        engine.step()
    assert largest_difference(before, masters(engine)) == 0


# --- parameter groups


def no_decay(name: str) -> bool:
    return "norm" in name or name.endswith("bias")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_group_that_freezing_empties_keeps_its_place(stage):
    """Decay and no-decay groups of one AdamW, and a scheduler of one lambda a group, built before the engine."""
    model = tiny_llama()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if no_decay(n)], "weight_decay": 0.0, "lr": 7e-3},
            {"params": [p for n, p in named.items() if not no_decay(n)], "weight_decay": 0.2, "lr": 1e-2},
        ],
        betas=(0.9, 0.99),
    )
    scheduler = LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1 / (1 + step)])
    engine = build_engine(model, stage=stage, optimizer=optimizer, lr_scheduler=scheduler)
    fill_values(engine.meft_adapters)
    assert engine.lr_scheduler is scheduler and engine.basic_optimizer is optimizer
    assert not any(p.requires_grad for p in named.values())
    # Of the first group nothing trains; had it been dropped, the rows would follow the wrong one.
    rates = follow(engine, 5, lambda name: 1)
    assert [first for first, _ in rates] == pytest.approx([7e-3 * 0.5**step for step in range(5)])
    assert [second for _, second in rates] == pytest.approx([1e-2 / (1 + step) for step in range(5)])


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("client", [True, False])
def test_rows_follow_the_group_of_their_ffn(client, stage):
    """Layer-wise learning rates, betas and decay, as an optimizer of the caller's or as `model_parameters`."""
    model = tiny_llama()
    groups = [
        {
            "params": list(layer.parameters()),
            "lr": 1e-2 / 3**index,
            "weight_decay": 0.3 * index,
            "betas": (0.8, 0.99),
        }
        for index, layer in enumerate(model.model.layers)
    ]
    # Layer 1 shares the group of the embeddings, and layer 2's comes before it.
    groups[1]["params"] += [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
    groups[1]["betas"] = (0.9, 0.95)
    groups[1], groups[2] = groups[2], groups[1]
    place = {0: 0, 1: 2, 2: 1}
    if client:
        engine = build_engine(model, stage=stage, optimizer=torch.optim.AdamW(groups, eps=1e-7))
    else:
        engine = build_engine(model, stage=stage, model_parameters=groups, adam={**ADAM, "eps": 1e-7})
    fill_values(engine.meft_adapters)
    assert len(engine.basic_optimizer.param_groups) == 3
    rates = follow(engine, 4, lambda name: place[layer_of(name)])
    assert rates[0] == pytest.approx([1e-2, 1e-2 / 9, 1e-2 / 3])


@pytest.mark.parametrize("stage", [0, 2])
def test_routers_train_in_the_group_of_their_ffn(stage):
    """DeepSpeed #7905: the updates of all groups but one were lost."""
    model = tiny_llama()
    groups = [
        {"params": list(layer.parameters()), "lr": 10.0 ** -(2 + index)}
        for index, layer in enumerate(model.model.layers)
    ]
    engine = build_engine(model, stage=stage, optimizer=torch.optim.AdamW(groups, weight_decay=0.0))
    fill_values(engine.meft_adapters)
    before = {name: router.detach().clone() for name, router in routers(engine).items()}
    engine.backward(lm_loss(engine, batch(1)))
    gradients = router_gradients(engine)
    engine.step()
    for index, (name, router) in enumerate(routers(engine).items()):
        moved = (router.detach() - before[name])[gradients[name].abs() > 1e-5]
        assert moved.numel() > 20
        # Adam's first step moves a weight by lr, whatever its gradient.
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 10.0 ** -(2 + index)), rtol=0.01, atol=0)


@pytest.mark.parametrize("stage", [0, 2])
def test_parameters_the_caller_trains_besides_keep_training(stage):
    """`freeze_base: false` leaves the caller's choice alone; its parameters share norm, clipping and groups."""
    model = tiny_llama()
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    engine = build_engine(
        model,
        tiny_block({"freeze_base": False}),
        stage=stage,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        adam=ADAM,
    )
    fill_values(engine.meft_adapters)
    norm_before = model.model.norm.weight.detach().clone()
    frozen_before = model.lm_head.weight.detach().clone()
    follow(engine, 3, lambda name: 0)
    assert (model.model.norm.weight - norm_before).abs().median() > 1e-3
    assert torch.equal(model.lm_head.weight, frozen_before)
