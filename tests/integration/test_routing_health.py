"""Losses and biases that keep experts in use, and a learning rate of the routers' own, in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft_engine
from meft_engine import MeftConfigError
from meft_engine.adapter.calls import Record
from meft_kernels import reference
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    largest_difference,
    lm_loss,
    masters,
    router_gradients,
    router_values,
    routers,
    row_gradients,
    train_step,
)
from tests.integration.oracles import ReferenceAdapter, reference_twin, twin_parts, twin_rows

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
HEALTH = {"balance": "loss", "balance_coef": 0.3, "z_loss_coef": 0.05}


def make_engine(router: dict[str, Any] | None = None, adapter: dict | None = None, **settings: Any) -> Any:
    model = settings.pop("model", None) or tiny_llama()
    engine = build_engine(model, tiny_block(adapter, router=router or {}), **{"adam": ADAM, **settings})
    fill_values(engine.meft_adapters)
    return engine


def listen_for_health_losses(twin: nn.Module) -> list[Tensor]:
    """The losses of every layer of each forward, written without the engine's code; the list is filled as it runs."""
    found: list[Tensor] = []

    def hear(module: ReferenceAdapter, args: tuple, output: Tensor) -> None:
        h = args[0].reshape(-1, args[0].shape[-1])
        logits = h @ module.router.T
        count = logits.shape[1]
        chosen = reference.largest(logits.detach(), module.shape["experts_per_token"])
        share = torch.stack([(chosen == e).float().mean() for e in range(count)])
        probability = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean(0)
        found.append(0.3 * count * (share * probability).sum())
        found.append(0.05 * (logits.exp().sum(1).log() ** 2).mean())

    for module in twin.modules():
        if isinstance(module, ReferenceAdapter):
            module.register_forward_hook(hear)
    return found


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(("stage", "gate"), [(0, "softmax"), (2, "softmax"), (3, "softmax"), (2, "none")])
def test_health_losses_have_the_gradient_of_losses_that_are_added(stage, gate, checkpointing):
    """Over two micro-steps of which each counts half; with the gate "none" they are all that routers learn from."""
    engine = make_engine(HEALTH, {"gate": gate}, stage=stage, gas=2)
    twin = reference_twin(tiny_llama(), engine) if stage < 3 else None
    if checkpointing is not None:
        engine.module.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    if twin is None:
        twin = reference_twin(tiny_llama(), make_engine(HEALTH, {"gate": gate}, stage=0))
    added = listen_for_health_losses(twin)
    for seed in (1, 2):
        loss = lm_loss(engine, batch(seed))
        engine.backward(loss)
        if seed == 1:
            engine.step()
        expected = lm_loss(twin, batch(seed))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5), "the reported loss is the model's own"
        ((expected + sum(added)) / 2).backward()
        added.clear()
    own, other = router_gradients(engine), twin_parts(twin, "router")
    assert own.keys() == other.keys()
    assert largest_difference(own, {name: router.grad for name, router in other.items()}) < 1e-5
    for name, parameter in twin_rows(twin).items():
        rows, grad = row_gradients(engine)[name]
        torch.testing.assert_close(grad, parameter.grad[rows], rtol=0, atol=1e-5)


def load_entropy(router: dict[str, Any], **settings: Any) -> float:
    engine = make_engine(router, {"rows": 64, "num_experts": 16}, stage=2, **settings)
    for step in range(40):
        train_step(engine, [batch(step % 4)])
    # Of the last ten steps, the experts' load as the adapters have counted it.
    before = {name: a.stats.load.clone() for name, a in engine.meft_adapters.adapters.items()}
    for step in range(10):
        train_step(engine, [batch(step % 4)])
    shares = [
        (a.stats.load - before[name]) / (a.stats.load - before[name]).sum()
        for name, a in engine.meft_adapters.adapters.items()
    ]
    return sum(float(torch.distributions.Categorical(share).entropy()) for share in shares) / len(shares)


def test_balancing_evens_the_load():
    alone = load_entropy({})
    assert load_entropy({"balance": "loss", "balance_coef": 0.5}) > alone + 0.1
    assert load_entropy({"balance": "bias", "balance_coef": 0.05}) > alone + 0.1


# --- the bias


BIAS = {"balance": "bias", "balance_coef": 0.05}


def biases(engine: Any) -> dict[str, Tensor]:
    return {name: a.expert_bias.clone() for name, a in engine.meft_adapters.adapters.items()}


def test_the_bias_moves_once_a_step_by_the_load_of_the_whole_window():
    engine = make_engine(BIAS, stage=2, gas=2)
    chosen: dict[str, list[Tensor]] = {}
    calls = next(iter(engine.meft_adapters.adapters.values()))._calls  # one tracker for all layers
    original = calls.record

    def record(adapter: nn.Module, h: Tensor, made: Record) -> None:
        chosen.setdefault(adapter.name, []).append(made.selection.experts.clone())
        original(adapter, h, made)

    calls.record = record
    train_step(engine, [batch(1), batch(2)])
    for name, bias in biases(engine).items():
        experts = torch.cat([e.flatten() for e in chosen[name]])
        load = torch.stack([(experts == e).sum() for e in range(5)]).float()
        torch.testing.assert_close(bias, 0.05 * (load.mean() - load).sign())
        assert len(chosen[name]) == 2


def test_the_bias_decides_which_experts_are_chosen_and_nothing_else():
    """Gates come from the logits alone: against the reference that gets the bias too."""
    engine = make_engine(BIAS, stage=0)
    adapter = next(iter(engine.meft_adapters.adapters.values()))
    adapter.expert_bias.copy_(torch.tensor([9.0, -9, 9, -9, 0]))
    h = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    expected, selection = reference.adapter(
        h,
        adapter.keys.master,
        adapter.values.master,
        adapter.router.detach(),
        experts_per_token=2,
        top_k=3,
        gate="softmax",
        expert_bias=adapter.expert_bias,
    )
    assert selection.experts.tolist() == [[0, 2]] * 11
    torch.testing.assert_close(adapter(h).detach(), expected, rtol=0, atol=1e-5)


def test_a_skipped_step_leaves_the_bias_alone():
    engine = make_engine(BIAS, stage=2)
    train_step(engine, [batch(1)])
    before = biases(engine)
    engine.backward(lm_loss(engine, batch(2)) * float("inf"))
    engine.step()
    assert not engine.was_step_applied() and differing(before, biases(engine)) == []
    train_step(engine, [batch(3)])
    assert differing(before, biases(engine)) != []


def test_the_bias_is_saved_resumed_and_used_for_inference(tmp_path):
    engine, resumed = make_engine(BIAS, stage=2), make_engine(BIAS, stage=2)
    for step in range(3):
        train_step(engine, [batch(step)])
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    resumed.load_checkpoint(str(tmp_path / "checkpoint"))
    assert differing(biases(engine), biases(resumed)) == []
    for step in range(3, 5):
        assert train_step(engine, [batch(step)]) == train_step(resumed, [batch(step)])
    assert differing(full_state(engine) | biases(engine), full_state(resumed) | biases(resumed)) == []

    engine.eval()
    engine.save_adapter(tmp_path / "adapter")
    model = meft_engine.load_adapter(tiny_llama().eval(), tmp_path / "adapter")
    with torch.no_grad():
        expected = engine(input_ids=batch(9)).logits
        torch.testing.assert_close(model(input_ids=batch(9)).logits, expected, rtol=0, atol=1e-5)
        for adapter in engine.meft_adapters.adapters.values():
            adapter.expert_bias.zero_()
        assert not torch.allclose(engine(input_ids=batch(9)).logits, expected, atol=1e-3)


def test_a_bias_is_not_dropped_in_silence(tmp_path):
    make_engine(BIAS, stage=2).save_checkpoint(str(tmp_path), tag="t")
    with pytest.raises(MeftConfigError, match=r'router.balance = "bias", not "none"'):
        make_engine(stage=2).load_checkpoint(str(tmp_path), tag="t")


# --- the routers' learning rate

STAGES = {
    "0": {"stage": 0},
    "0, bf16": {"stage": 0, "bf16": True},
    "1": {"stage": 1},
    "2, bf16": {"stage": 2, "bf16": True},
    "2, offloaded": {"stage": 2, "offload": True},
    "3": {"stage": 3},
    "3, both offloaded": {"stage": 3, "offload": True, "offload_param": True},
}


def router_masters(engine: Any) -> dict[str, Tensor]:
    """In fp32, also where the model has them in bf16."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage():
        return {name: safe_get_full_fp32_param(router).float().clone() for name, router in routers(engine).items()}
    flat = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    if len(flat) == len(routers(engine)):
        return {name: p.detach().clone().view(5, -1) for name, p in zip(routers(engine), flat, strict=True)}
    return dict(zip(routers(engine), flat[0].detach().clone().view(3, 5, -1), strict=True))


# `slow`, since DeepSpeed compiles its fused Adam on first use.
FUSED = pytest.param("0, bf16, fused", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*STAGES, FUSED])
def test_routers_step_at_their_own_rate(name, tmp_path):
    """A step from one state, moments and weight decay included, is proportional to the rate."""
    settings = {**STAGES.get(name, STAGES["0, bf16"]), "clip": 0.5}
    if "fused" in name:
        settings["adam"] = {**ADAM, "torch_adam": False}
    whole, quarter = make_engine(**settings), make_engine({"lr_scale": 0.25}, **settings)
    for step in range(2):
        train_step(whole, [batch(step)])
    whole.save_checkpoint(str(tmp_path))
    quarter.load_checkpoint(str(tmp_path))
    start = router_masters(whole)
    assert differing(start, router_masters(quarter)) == []
    for engine in (whole, quarter):
        train_step(engine, [batch(7)])
    assert differing(masters(whole), masters(quarter)) == []
    moved, less = router_masters(whole), router_masters(quarter)
    for router, before in start.items():
        expected = before + 0.25 * (moved[router] - before)
        torch.testing.assert_close(less[router], expected, rtol=0, atol=1e-7)
        assert (moved[router] - before).abs().max() > 1e-3
    # What the model computes with follows the masters.
    dtype = next(iter(router_values(quarter).values())).dtype
    assert differing(router_values(quarter), {k: v.to(dtype) for k, v in less.items()}) == []


def test_an_optimizer_that_outlives_the_engine_steps_as_ever_again():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = build_engine(model, tiny_block(router={"lr_scale": 0.25}), optimizer=optimizer)
    assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    engine.destroy()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_schedulers_rate_is_scaled_and_not_replaced():
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"}}
    engines = [make_engine(r, stage=2, scheduler=schedule) for r in ({}, {"lr_scale": 0.5})]
    for step in range(4):
        for engine in engines:
            train_step(engine, [batch(step)])
        assert engines[0].get_lr() == engines[1].get_lr()
        rates = [engine.basic_optimizer.param_groups[0]["lr"] for engine in engines]
        assert rates[0] == rates[1]
