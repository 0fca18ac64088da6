"""The engine with its model on a GPU: equal to the reference on the CPU, and to itself where only memory differs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import meft_engine
from tests.families import fill_values, tiny_block, tiny_llama, token_ids
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    largest_difference,
    lm_loss,
    masters,
    router_gradients,
    row_gradients,
    tables,
    train_step,
)
from tests.integration.oracles import LazyAdamW, reference_twin, twin_parts, twin_rows

ADAM = {"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
SHAPE = {"center_inputs": True, "top_k": 5}


def make_engine(model: Any = None, *, block: dict[str, Any] | None = None, **settings: Any) -> Any:
    engine = build_engine(
        tiny_llama() if model is None else model, block or tiny_block(SHAPE), **{"adam": ADAM, **settings}
    )
    fill_values(engine.meft_adapters)
    return engine


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    """Some of torch's operators on a GPU add in an order that changes from run to run, unless told not to."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def losses_of(engine: Any, steps: int, start: int = 0, gas: int = 1) -> list[float]:
    return [train_step(engine, [batch(gas * step + i) for i in range(gas)]) for step in range(start, start + steps)]


def test_the_model_and_the_resident_keys_are_on_the_gpu_and_the_rows_in_pinned_memory():
    engine = make_engine()
    assert next(engine.module.parameters()).is_cuda
    for name, table in tables(engine).items():
        high, _ = table.planes()
        assert high.device.type == "cpu" and high.is_pinned()
        with table.reading() as rows:
            assert rows.is_cuda == name.endswith("keys")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gate", ["softmax", "none"])
def test_every_step_equals_the_reference_and_adamw_in_float64(stage, gate):
    engine = make_engine(block=tiny_block({**SHAPE, "gate": gate}), stage=stage)
    lm_loss(engine, batch(99))  # measures the center
    oracle = LazyAdamW(masters(engine))
    for step in range(6):
        twin = reference_twin(tiny_llama(), engine)
        loss, expected = lm_loss(engine, batch(step)), lm_loss(twin, batch(step))
        engine.backward(loss)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        parts, touched = twin_rows(twin), row_gradients(engine)
        assert touched.keys() == parts.keys()
        for name, (rows, grads) in touched.items():
            dense = torch.zeros_like(parts[name])
            dense[rows] = grads
            torch.testing.assert_close(dense, parts[name].grad, rtol=1e-3, atol=1e-6)
        for name, grad in router_gradients(engine).items():
            torch.testing.assert_close(grad, twin_parts(twin, "router")[name].grad, rtol=1e-3, atol=1e-6)
        oracle.step(touched, lambda name: ADAM)
        engine.step()
    assert largest_difference(masters(engine), oracle.weights) < 2e-6


def test_the_device_copy_of_the_keys_follows_the_masters():
    engine = make_engine(bf16=True, stage=2)
    losses_of(engine, 3)
    for name, table in tables(engine).items():
        with table.reading(latest=True) as rows:
            assert torch.equal(rows.cpu(), table.master.to(torch.bfloat16)), name


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_beside_the_next_forward_changes_nothing(bf16, deterministic):
    states, losses = [], []
    for overlap in (False, True):
        block = tiny_block(SHAPE, optimizer={"overlap": overlap})
        engine = make_engine(block=block, bf16=bf16, stage=2 if bf16 else 0, gas=2, clip=0.5)
        losses.append(losses_of(engine, 8, gas=2))
        states.append(full_state(engine))
    assert losses[0] == losses[1]
    assert not differing(*states)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    states = []
    for checkpointed in (False, True):
        model = tiny_llama()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        engine = make_engine(model)
        losses_of(engine, 4)
        states.append(masters(engine))
    assert largest_difference(*states) < 1e-6


@pytest.mark.parametrize("stage, bf16", [(0, False), (2, True), (3, True)])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(stage, bf16, tmp_path, deterministic):
    straight = make_engine(stage=stage, bf16=bf16)
    losses_of(straight, 3)
    straight.save_checkpoint(str(tmp_path))
    expected = losses_of(straight, 3, start=3)
    resumed = make_engine(stage=stage, bf16=bf16)
    resumed.load_checkpoint(str(tmp_path))
    assert losses_of(resumed, 3, start=3) == expected
    assert not differing(full_state(straight), full_state(resumed))


@pytest.mark.parametrize("balance", ["bias", "loss"])
def test_balanced_routing_trains(balance):
    engine = make_engine(block=tiny_block({"center_inputs": True}, router={"balance": balance}))
    losses = [train_step(engine, [batch(0)]) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05
    biases = [adapter.expert_bias for adapter in engine.meft_adapters.adapters.values()]
    assert all(bool(bias.any()) for bias in biases) if balance == "bias" else biases == [None] * 3


def test_rows_out_of_date_are_caught_up_where_untouched_rows_move_too(deterministic):
    block = tiny_block(SHAPE, optimizer={"mode": "dense_equivalent"})
    losses = losses_of(make_engine(block=block), 6)
    block = tiny_block({**SHAPE}, optimizer={"mode": "dense_equivalent", "overlap": False})
    assert losses_of(make_engine(block=block), 6) == losses


def test_generation_and_a_loaded_adapter_agree(tmp_path):
    engine = make_engine()
    losses_of(engine, 4)
    engine.eval()
    ids = token_ids(3, 9, seed=3).cuda()
    with torch.no_grad():
        logits = engine(input_ids=ids, use_cache=False).logits
        generated = engine.module.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    engine.save_adapter(tmp_path)
    plain = tiny_llama().eval().cuda()
    meft_engine.load_adapter(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(plain.generate(input_ids=ids, max_new_tokens=6, do_sample=False), generated)


def test_rows_on_the_device_and_a_model_that_moves_give_the_same_logits(tmp_path):
    """Loaded where it computes, with values on the host and on the device; and loaded on the CPU, then moved."""
    engine = make_engine()
    losses_of(engine, 2)
    engine.save_adapter(tmp_path)
    ids, found = token_ids(3, 9, seed=3).cuda(), []
    for rows in ("host", "device"):
        for moves in (False, True):
            model = tiny_llama().eval()
            model = model if moves else model.cuda()
            meft_engine.load_adapter(model, tmp_path, rows=rows)
            model.cuda()
            with torch.no_grad():
                found.append(model(input_ids=ids, use_cache=False).logits)
            values = model.model.layers[0].mlp.meft_adapter.values
            assert (values.bytes_to_device == 0) == (rows == "device")
    assert all(torch.equal(found[0], logits) for logits in found[1:])


WAYS = {
    "slots for no layer": {"slot_bytes": 0},
    "slots for some": {"slot_bytes": 4000},
    "gradients on the device": {"grad_slot_bytes": 10**9},
    "gradients of some rows": {"grad_slot_bytes": 8000},
    "not pinned": {"pin_memory": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_how_rows_travel_changes_nothing(way, deterministic):
    states, losses = [], []
    for offload in ({}, WAYS[way]):
        engine = make_engine(block=tiny_block(SHAPE, offload=offload), gas=3, clip=0.5)
        losses.append(losses_of(engine, 6, gas=3))
        states.append(full_state(engine))
    assert losses[0] == losses[1]
    assert not differing(*states)


@pytest.mark.parametrize("offload", [{"keys": "host"}, {"keys_dtype": "int8"}], ids=["host", "int8"])
def test_keys_elsewhere_and_in_eight_bits(offload):
    """Scored on the host as on the device, up to rounding; and with a loss that falls in either case."""
    losses = [losses_of(make_engine(block=tiny_block(SHAPE, offload=given)), 6) for given in ({}, offload)]
    tolerance = 1e-4 if "keys" in offload else 2e-2
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_rows_that_stay_are_not_brought_again():
    engine = make_engine(gas=2)
    losses_of(engine, 2, gas=2)
    traffic = engine.meft_report()["traffic"]
    assert traffic["misses"] > 0 and traffic["hits"] > 0
    width = tables(engine).popitem()[1].width
    assert traffic["values_to_device"] == traffic["misses"] * width * 4


@pytest.mark.parametrize("offload", [{}, {"grad_slot_bytes": 12 * 2**20, "keys_dtype": "int8"}], ids=["", "int8"])
def test_the_report_counts_what_the_device_holds(offload):
    """Beside what CUDA's allocator has given out since before the model was there, all of it and at its peak."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shape = {"rows": 8192, "num_experts": 64, "experts_per_token": 4, "top_k": 8}
    engine = build_engine(
        tiny_llama(hidden_size=512), tiny_block(shape, offload=offload), adam=ADAM, bf16=True, stage=2
    )
    losses_of(engine, 2)
    engine.synchronize_rows()
    torch.cuda.synchronize()
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    kinds = engine.meft_report()["device_bytes_by_kind"]
    base = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    lasting = base + kinds["keys"] + kinds["slots"] + kinds["gradient_slots"]
    assert lasting <= held <= 1.1 * (lasting + kinds["routers"]) + 2**20
    assert lasting <= peak <= 1.1 * (base + sum(kinds.values())) + 16 * 2**20
