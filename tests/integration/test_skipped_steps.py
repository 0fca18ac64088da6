"""A norm that is not finite changes nothing (rows, routers, moments, schedule), and the next step is as ever."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.families import fill_values, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    lm_loss,
    routers,
    row_gradients,
    tables,
    train_step,
)

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def spoil_rows(engine: Any, loss: torch.Tensor, value: float) -> None:
    """One element of one row's gradient."""
    engine.backward(loss)
    list(tables(engine).values())[3].gradient().grad[0, 5] = value


def spoil_router(engine: Any, loss: torch.Tensor, value: float) -> None:
    """One element of one router's gradient, before DeepSpeed takes it up."""

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[0, 3] = value
        return grad

    handle = list(routers(engine).values())[1].register_hook(spoil)
    engine.backward(loss)
    handle.remove()
    for rows, grad in row_gradients(engine).values():
        assert rows.numel() and grad.isfinite().all()


def spoil_loss(engine: Any, loss: torch.Tensor, value: float) -> None:
    """The loss itself, as an overflow in the model makes it."""
    engine.backward(loss * value)


FAULTS = {
    "rows-nan": (spoil_rows, math.nan),
    "rows-inf": (spoil_rows, math.inf),
    "router-nan": (spoil_router, math.nan),
    "router-inf": (spoil_router, -math.inf),
    "loss-inf": (spoil_loss, math.inf),
    "loss-nan": (spoil_loss, math.nan),
}


def make_schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.8**step)


def make_engine(**settings: Any) -> Any:
    engine = build_engine(tiny_llama(), adam=ADAM, lr_scheduler=make_schedule, **settings)
    fill_values(engine.meft_adapters)
    return engine


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("stage", "bf16", "offload"),
    [
        *((0, False, False), (0, True, False), (1, False, False), (2, False, False), (2, True, False), (2, True, True)),
        *((3, False, False), (3, True, True)),
    ],
)
def test_a_norm_that_is_not_finite_changes_nothing(stage, bf16, offload, fault, clip):
    settings = {"stage": stage, "bf16": bf16, "offload": offload, "clip": clip}
    engine, control = make_engine(**settings), make_engine(**settings)
    for one in (engine, control):
        train_step(one, [batch(1)])
    before, rate = full_state(engine), engine.get_lr()

    spoil, value = FAULTS[fault]
    spoil(engine, lm_loss(engine, batch(2)), value)
    engine.step()

    assert differing(before, full_state(engine)) == []
    assert all(table.gradient() is None for table in tables(engine).values())
    assert (engine.skipped_steps, engine.global_steps) == (1, 2)
    assert not engine.was_step_applied()
    assert not math.isfinite(engine.get_global_grad_norm())
    assert engine.get_lr() == rate and engine.lr_scheduler.last_epoch == 1

    # The engine goes on as one that never saw the bad batch.
    for one in (engine, control):
        train_step(one, [batch(3)])
    assert engine.was_step_applied() and engine.skipped_steps == 1
    assert differing(full_state(engine), full_state(control)) == []
    assert differing(before, full_state(engine)) != []
    assert engine.get_global_grad_norm() == control.get_global_grad_norm()
    assert engine.get_lr() == control.get_lr() != rate


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("fault", ["rows-nan", "router-nan"])
def test_one_bad_micro_step_spoils_its_window_and_no_other(stage, fault):
    engine, control = make_engine(stage=stage, gas=2), make_engine(stage=stage, gas=2)
    for one in (engine, control):
        train_step(one, [batch(5), batch(6)])
    before = full_state(engine)
    spoil, value = FAULTS[fault]
    spoil(engine, lm_loss(engine, batch(1)), value)
    engine.step()
    engine.backward(lm_loss(engine, batch(2)))
    engine.step()
    assert engine.skipped_steps == 1
    assert differing(before, full_state(engine)) == []
    for one in (engine, control):
        train_step(one, [batch(3), batch(4)])
    assert differing(full_state(engine), full_state(control)) == []
