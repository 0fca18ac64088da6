"""Accumulated micro-steps equal one large batch of a dense model; one joint norm clips both kinds of parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_optimizer_state

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
    train_step,
)
from tests.integration.oracles import LazyAdamW, reference_twin, twin_parts, twin_rows

GAS, STEPS = 4, 4
ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def large_batch(step: int) -> torch.Tensor:
    return batch(100 + step, size=8, length=6)


def backward_by_engine(engine, ids: torch.Tensor) -> float:
    loss = lm_loss(engine, ids)
    engine.backward(loss)
    return loss.item()


def backward_by_loss(engine, ids: torch.Tensor) -> float:
    # DeepSpeed divides the gradient of every output by the accumulation steps, so the model must not return both the
    # logits and the loss made of them.
    logits = engine(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


def dense_rows(gradients: dict, engine) -> dict[str, torch.Tensor]:
    """Row gradients as dense [r, d] tensors, zero where nothing was touched."""
    dense = {}
    for name, (rows, grad) in gradients.items():
        dense[name] = torch.zeros_like(tables(engine)[name].master)
        dense[name][rows] = grad
    return dense


def engine_with_values(**settings):
    """An engine whose values have left zero, so that keys and routers get gradients from the first step on."""
    engine = build_engine(tiny_llama(), adam=ADAM, **settings)
    fill_values(engine.meft_adapters)
    return engine


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize(
    ("stage", "backward"), [(0, backward_by_engine), (2, backward_by_engine), (2, backward_by_loss)]
)
def test_micro_steps_equal_one_large_dense_batch(stage, backward, max_norm):
    """Every step: gradients, norm, clipped gradients and updates are those of autograd and torch on a dense model."""
    engine = engine_with_values(stage=stage, gas=GAS, clip=max_norm)
    twin = reference_twin(tiny_llama(), engine)
    rows, twin_routers = twin_rows(twin), twin_parts(twin, "router")
    trained = [*rows.values(), *twin_routers.values()]
    row_oracle = LazyAdamW({name: p.detach() for name, p in rows.items()})
    router_oracle = torch.optim.AdamW(twin_routers.values(), **{**ADAM, "betas": tuple(ADAM["betas"])})
    bound = []
    for step in range(STEPS):
        losses = [backward_and_step(engine, backward, ids) for ids in large_batch(step).chunk(GAS)[:-1]]
        assert engine.global_steps == step
        losses.append(backward(engine, large_batch(step).chunk(GAS)[-1]))
        touched, router_grads = row_gradients(engine), router_gradients(engine)

        loss = lm_loss(twin, large_batch(step))
        loss.backward()
        assert sum(losses) / GAS == pytest.approx(loss.item(), abs=1e-5)
        assert largest_difference(dense_rows(touched, engine), {n: p.grad for n, p in rows.items()}) < 1e-5
        assert largest_difference(router_grads, {n: p.grad for n, p in twin_routers.items()}) < 1e-5

        engine.step()
        assert engine.global_steps == step + 1
        norm = float(torch.nn.utils.clip_grad_norm_(trained, max_norm or torch.inf))
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-4)
        bound.append(norm > max_norm > 0)
        if step == 0:
            check_first_moments(engine, rows, twin_routers)
        clipped = {name: (ids, rows[name].grad[ids]) for name, (ids, _) in touched.items()}
        row_oracle.step(clipped, lambda _: ADAM)
        router_oracle.step()
        with torch.no_grad():
            for name, parameter in rows.items():
                parameter.copy_(row_oracle.weights[name])
        twin.zero_grad()
        assert largest_difference(masters(engine), row_oracle.weights) < 1e-4
        assert largest_difference(routers(engine), twin_routers) < 1e-4
    assert any(bound) == (max_norm > 0)


def backward_and_step(engine, backward, ids: torch.Tensor) -> float:
    """A micro-step within the window: `step` is called, as DeepSpeed wants it, and must not step."""
    loss = backward(engine, ids)
    before = masters(engine)
    engine.step()
    assert largest_difference(before, masters(engine)) == 0
    return loss


def check_first_moments(engine, rows: dict, twin_routers: dict) -> None:
    """After the first step exp_avg is (1 − β₁) times the clipped gradient, whose scale Adam's update itself hides."""
    share = 1 - ADAM["betas"][0]
    for name, table in tables(engine).items():
        moment = engine.row_optimizer.state[table.handle]["exp_avg"]
        torch.testing.assert_close(moment, share * rows[name].grad, rtol=1e-3, atol=1e-7)
    for name, parameter in twin_routers.items():
        router = routers(engine)[name]
        if engine.zero_optimization_stage():
            moment = safe_get_full_optimizer_state(router, "exp_avg")
        else:
            moment = engine.basic_optimizer.state[router]["exp_avg"]
        torch.testing.assert_close(moment, share * parameter.grad, rtol=1e-3, atol=1e-7)


def five_steps(engine, gas: int) -> tuple[list[float], list[float], dict, dict]:
    losses, norms = [], []
    for step in range(5):
        losses.append(train_step(engine, batch(200 + step % 2, size=8, length=10).chunk(gas)))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, masters(engine), {name: router.detach() for name, router in routers(engine).items()}


@pytest.mark.parametrize(("bf16", "gas"), [(False, 2), (True, 2)])
def test_stages_and_offload_agree(bf16, gas):
    settings = {"bf16": bf16, "gas": gas, "clip": 0.5}
    stage_0 = engine_with_values(stage=0, **settings)
    runs = [
        five_steps(stage_0, gas),
        five_steps(engine_with_values(stage=2, **settings), gas),
        five_steps(engine_with_values(stage=2, offload=True, **settings), gas),
    ]
    losses, norms, rows, final_routers = runs[0]
    assert losses[-1] < losses[0] - 0.1 and max(norms) > 0.5
    for other_losses, other_norms, other_rows, other_routers in runs[1:]:
        assert other_losses == pytest.approx(losses, abs=1e-4)
        assert other_norms == pytest.approx(norms, abs=1e-4)
        assert largest_difference(rows, other_rows) < 1e-4
        assert largest_difference(final_routers, other_routers) < 1e-4


@pytest.mark.slow
def test_deepspeeds_own_cpu_adam_agrees():
    """`slow`, since DeepSpeed compiles its CPU Adam on first use."""
    own = engine_with_values(stage=2, offload=True, clip=0.5)
    config = {**ADAM, "torch_adam": False}
    other = build_engine(tiny_llama(), adam=config, stage=2, offload=True, clip=0.5)
    fill_values(other.meft_adapters)
    assert type(other.basic_optimizer).__name__ == "DeepSpeedCPUAdam"
    runs = five_steps(own, 1), five_steps(other, 1)
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    assert largest_difference(runs[0][2], runs[1][2]) < 1e-4


@pytest.mark.slow
def test_stage_0_with_deepspeeds_fused_adam_agrees_in_bf16():
    """`slow`, since DeepSpeed compiles its fused Adam on first use."""
    fused = build_engine(tiny_llama(), adam={**ADAM, "torch_adam": False}, bf16=True, clip=0.5)
    fill_values(fused.meft_adapters)
    assert type(fused.optimizer).__name__ == "FP16_Optimizer"
    runs = five_steps(fused, 1), five_steps(engine_with_values(stage=2, bf16=True, clip=0.5), 1)
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-4)
    assert largest_difference(runs[0][2], runs[1][2]) < 1e-4


@pytest.mark.parametrize("stage", [0, 2])
def test_micro_steps_that_touch_other_rows_all_count(stage):
    """The micro-batches share few rows, so that a sum which kept only the first or the last would lose whole rows."""
    engine = engine_with_values(stage=stage, gas=3)
    seen = []
    for seed in range(3):
        engine.backward(lm_loss(engine, batch(300 + seed, size=1, length=3)))
        seen.append({name: set(rows.tolist()) for name, (rows, _) in row_gradients(engine).items()})
        if seed < 2:
            engine.step()
    for name in seen[0]:
        assert seen[0][name] < seen[1][name] < seen[2][name], "choose batches that touch other rows"
    engine.step()
    for name, table in tables(engine).items():
        steps = engine.row_optimizer.state[table.handle]["step"]
        assert set(steps.nonzero().flatten().tolist()) == seen[2][name]
        assert table.gradient() is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_touches_no_row(side):
    """A padded batch touches the rows that its texts touch one by one, so that no row ages or decays by padding."""
    block = tiny_block({"rows": 500})
    texts = [batch(400, size=1, length=3), batch(401, size=1, length=8)]
    padded, alone = build_engine(tiny_llama(), block), build_engine(tiny_llama(), block, gas=2)
    missing = texts[1].shape[1] - texts[0].shape[1]
    fill = (missing, 0) if side == "left" else (0, missing)
    ids = torch.cat((F.pad(texts[0], fill), texts[1]))
    mask = torch.cat((F.pad(torch.ones_like(texts[0]), fill), torch.ones_like(texts[1])))
    labels = ids.masked_fill(mask == 0, -100)
    padded.backward(padded(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss)
    for text in texts:
        alone.backward(lm_loss(alone, text))
    touched, expected = row_gradients(padded), row_gradients(alone)
    assert touched.keys() == expected.keys() == tables(padded).keys()
    for name, (rows, _) in touched.items():
        assert sorted(rows.tolist()) == sorted(expected[name][0].tolist())
        assert rows.numel() < 50, "few enough for padding to stand out"


def test_one_boundary_set_by_hand_ends_the_window():
    """accelerate accumulates with `set_gradient_accumulation_boundary` and one `step` a window."""
    ids = large_batch(0)
    managed, by_hand = (engine_with_values(gas=2, clip=0.5) for _ in range(2))
    train_step(managed, ids.chunk(2))
    for last, half in enumerate(ids.chunk(2)):
        by_hand.set_gradient_accumulation_boundary(bool(last))
        by_hand.backward(lm_loss(by_hand, half))
    by_hand.step()
    assert largest_difference(masters(managed), masters(by_hand)) == 0
    assert managed.get_global_grad_norm() == by_hand.get_global_grad_norm()
