"""``adapter.center_inputs``: what the center is, when it is measured, and that it is part of the adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import meft_engine
from meft_engine import MeftConfigError
from tests.families import fill_values, tiny_block, tiny_llama, token_ids
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    lm_loss,
    masters,
    router_gradients,
    row_gradients,
    train_step,
)
from tests.integration.oracles import reference_twin, twin_parts, twin_rows


def make_engine(model: Any = None, adapter: dict[str, Any] | None = None, **settings: Any) -> Any:
    model = tiny_llama() if model is None else model
    return build_engine(model, tiny_block({"center_inputs": True, **(adapter or {})}), **settings)


def centers(engine: Any) -> dict[str, Tensor]:
    return {name: adapter.center.clone() for name, adapter in engine.meft_adapters.adapters.items()}


def ffn_inputs(model: torch.nn.Module, names: list[str], **inputs: Tensor) -> dict[str, Tensor]:
    """[batch, seq, d] of each FFN of a model without adapters."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("stage, bf16", [(0, False), (2, True), (3, False)])
def test_the_center_is_the_mean_input_of_the_real_tokens_of_the_first_micro_batch(stage, bf16):
    engine = make_engine(tiny_llama(), stage=stage, bf16=bf16)
    assert not any(center.any() for center in centers(engine).values())
    ids, mask = batch(1), torch.ones(4, 12, dtype=torch.int64)
    mask[0, :5] = 0
    mask[2, 9:] = 0
    engine(input_ids=ids, attention_mask=mask, use_cache=False)
    plain = tiny_llama().to(torch.bfloat16 if bf16 else torch.float32)
    inputs = ffn_inputs(plain, list(centers(engine)), input_ids=ids, attention_mask=mask)
    for name, center in centers(engine).items():
        expected = inputs[name][mask.bool()].double().mean(0)
        torch.testing.assert_close(center.double(), expected, rtol=0, atol=2e-2 if bf16 else 1e-5)
        assert float(center.norm()) > 0.1


def test_later_micro_batches_and_evaluation_leave_it_alone():
    engine = make_engine(gas=2)
    engine.eval()
    lm_loss(engine, batch(5))
    assert not any(center.any() for center in centers(engine).values())
    engine.train()
    lm_loss(engine, batch(1))
    first = centers(engine)
    train_step(engine, [batch(2), batch(3)])
    engine.eval()
    lm_loss(engine, batch(4))
    assert not differing(first, centers(engine))


@pytest.mark.parametrize("spoil", ["nan", "inf", "padding"])
def test_a_micro_batch_that_tells_nothing_is_passed_over(spoil):
    engine = make_engine()
    adapter = next(iter(engine.meft_adapters.adapters.values()))
    h = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    if spoil == "padding":
        adapter(h[:0])
    else:
        bad = h.clone()
        bad[3, 5] = float(spoil)
        adapter(bad)
    assert not adapter.center.any()
    adapter(h)
    torch.testing.assert_close(adapter.center, h.mean(0))


@pytest.mark.parametrize("gate", ["softmax", "none"])
def test_training_equals_the_reference_over_centered_inputs(gate):
    """Losses and gradients of rows, routers and, through them, of the layers below, after the center is known."""
    engine = make_engine(adapter={"gate": gate, "top_k": 5})
    lm_loss(engine, batch(1))
    fill_values(engine.meft_adapters)
    twin = reference_twin(tiny_llama(), engine)
    for seed in (2, 3):
        loss, expected = lm_loss(engine, batch(seed)), lm_loss(twin, batch(seed))
        engine.backward(loss)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parts = twin_rows(twin)
    assert row_gradients(engine).keys() == parts.keys()
    for name, (rows, grads) in row_gradients(engine).items():
        dense = torch.zeros_like(parts[name])
        dense[rows] = grads
        torch.testing.assert_close(dense, parts[name].grad, rtol=1e-4, atol=1e-6)
    for name, grad in router_gradients(engine).items():
        torch.testing.assert_close(grad, twin_parts(twin, "router")[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_centered_once_and_alike(reentrant):
    results = []
    for checkpointed in (False, True):
        model = tiny_llama()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # With a smaller eps, a gradient of next to nothing would move its element a whole step, in either direction.
        engine = make_engine(model, adam={"eps": 1e-4})
        for seed in (1, 2, 3):
            train_step(engine, [batch(seed)])
        results.append((centers(engine), masters(engine)))
    for one, other in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_goes_on_with_the_same_center(tmp_path):
    engine = make_engine(stage=2, bf16=True)
    for seed in (1, 2):
        train_step(engine, [batch(seed)])
    engine.save_checkpoint(str(tmp_path))
    other = make_engine(stage=2, bf16=True)
    other.load_checkpoint(str(tmp_path))
    assert not differing(centers(engine), centers(other))
    for one in (engine, other):
        train_step(one, [batch(3)])
    assert not differing({**full_state(engine), **centers(engine)}, {**full_state(other), **centers(other)})


def test_a_checkpoint_from_before_the_first_step_lets_the_center_be_measured_later(tmp_path):
    engine = make_engine()
    engine.save_checkpoint(str(tmp_path))
    other = make_engine()
    lm_loss(other, batch(9))
    other.load_checkpoint(str(tmp_path))
    assert not any(center.any() for center in centers(other).values())
    lm_loss(other, batch(1))
    lm_loss(engine, batch(1))
    assert not differing(centers(engine), centers(other))


def test_the_adapter_carries_it_to_inference(tmp_path):
    engine = make_engine()
    for seed in (1, 2):
        train_step(engine, [batch(seed)])
    engine.save_adapter(tmp_path)
    model = meft_engine.load_adapter(tiny_llama(), tmp_path).eval()
    engine.eval()
    ids = token_ids(3, 9)
    with torch.no_grad():
        expected, found = engine(input_ids=ids).logits, model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for module in model.modules():
            if hasattr(module, "meft_adapter"):
                module.meft_adapter.center.zero_()
        assert float((model(input_ids=ids).logits - expected).abs().max()) > 1e-3


def test_an_adapter_over_other_inputs_is_refused(tmp_path):
    make_engine().save_checkpoint(str(tmp_path))
    plain = build_engine(tiny_llama())
    with pytest.raises(MeftConfigError, match=r"adapter.center_inputs = True, not False"):
        plain.load_checkpoint(str(tmp_path))


def test_observers_get_each_selection_once_with_its_activations():
    """Also where a checkpointed layer selects once and is computed twice."""
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = make_engine(model)
    adapter = next(iter(engine.meft_adapters.adapters.values()))
    seen, inputs = [], []
    adapter.observers.append(lambda *found: seen.append(found))
    adapter.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    keys, router = adapter.keys.master.clone(), adapter.router.detach().clone()
    train_step(engine, [batch(1)])
    (selection, activations, overflow), h = seen[0], inputs[0].reshape(-1, 32)
    assert len(seen) == 1 and len(inputs) == 2
    h = h - h.mean(0)
    gates = 2 * torch.softmax((h @ router.T).gather(1, selection.experts), -1)
    for t, k in selection.valid.nonzero().tolist():
        key = keys[selection.active[selection.picks[t, k]]]
        expected = float(gates[t, selection.slots[t, k]] * (h[t] @ key))
        assert float(activations[t, k]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert float(overflow.mass) == pytest.approx(float(activations[selection.valid].sum()), rel=1e-5)


@pytest.mark.parametrize("balance, said", [("none", True), ("bias", True), ("loss", False)])
def test_a_router_that_nothing_teaches_is_told_of(balance, said, caplog):
    build_engine(tiny_llama(), tiny_block({"gate": "none"}, router={"balance": balance}))
    assert ("the router gets no gradient" in caplog.text) == said
