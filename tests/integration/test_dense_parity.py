"""50 steps of the engine equal dense training where every row is touched, and a float64 oracle where few are."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.families import tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    ds_config,
    largest_difference,
    lm_loss,
    masters,
    router_gradients,
    row_gradients,
    tables,
    train_step,
)
from tests.integration.oracles import LazyAdamW, clip_factor, dense_twin, global_norm, twin_rows

ROWS, STEPS, CLIP = 16, 50, 1.05
ADAM = {"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
DENSE = {"rows": ROWS, "num_experts": 1, "experts_per_token": 1, "top_k": ROWS, "gate": "none"}


def warm_up_then_decay(step: int) -> float:
    """Factor of the learning rate."""
    return (step + 1) / 5 if step < 5 else 1 - 0.8 * (step - 5) / (STEPS - 5)


def make_schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, warm_up_then_decay)


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    # Many tokens, so that no row stays untouched, in a few batches, so that the loss falls.
    return [batch(seed, size=6, length=24) for seed in range(4)]


@pytest.fixture(scope="module")
def dense_run(batches) -> dict:
    """What plain PyTorch makes of the dense adapter: losses, norms before clipping, rows after every step."""
    engine = build_engine(tiny_llama(), tiny_block(DENSE), adam=ADAM)
    twin = dense_twin(tiny_llama(), engine)
    trained = [p for p in twin.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(engine.meft_adapters.adapters)
    optimizer = torch.optim.AdamW(
        trained, lr=ADAM["lr"], betas=tuple(ADAM["betas"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )
    scheduler = make_schedule(optimizer)
    run = {"losses": [], "norms": []}
    for step in range(STEPS):
        loss = lm_loss(twin, batches[step % len(batches)])
        loss.backward()
        run["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run["losses"].append(loss.item())
    run["rows"] = {name: rows.detach().clone() for name, rows in twin_rows(twin).items()}
    assert run["losses"][-1] < run["losses"][0] - 0.1, "nothing was learned, so equality would say little"
    assert min(run["norms"]) < CLIP < max(run["norms"]), "clipping must bind in some steps and not in others"
    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engine_equals_torch_adamw_on_a_dense_adapter(stage, batches, dense_run):
    engine = build_engine(
        tiny_llama(), tiny_block(DENSE), stage=stage, clip=CLIP, adam=ADAM, lr_scheduler=make_schedule
    )
    start, every_row = masters(engine), torch.arange(ROWS)
    losses, norms = [], []
    for step in range(STEPS):
        loss = lm_loss(engine, batches[step % len(batches)])
        engine.backward(loss)
        touched = row_gradients(engine)
        assert touched.keys() == start.keys()
        for name, (rows, _) in touched.items():
            assert torch.equal(rows, every_row), f"step {step} leaves rows of {name} untouched: choose other batches"
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())

    assert losses == pytest.approx(dense_run["losses"], abs=1e-4)
    assert norms == pytest.approx(dense_run["norms"], abs=1e-4)
    assert largest_difference(masters(engine), dense_run["rows"]) < 1e-4
    for name, rows in masters(engine).items():
        assert (rows - start[name]).abs().amax(1).min() > 1e-3, f"a row of {name} has hardly moved"


def test_plain_deepspeed_equals_torch_adamw_on_a_dense_adapter(batches, dense_run):
    template = build_engine(tiny_llama(), tiny_block(DENSE))
    twin = dense_twin(tiny_llama(), template)
    engine, *_ = deepspeed.initialize(
        model=twin,
        model_parameters=[p for p in twin.parameters() if p.requires_grad],
        lr_scheduler=make_schedule,
        config=ds_config(None, clip=CLIP, adam=ADAM),
    )
    assert type(engine) is deepspeed.DeepSpeedEngine
    losses = [train_step(engine, [batches[step % len(batches)]]) for step in range(STEPS)]
    assert losses == pytest.approx(dense_run["losses"], abs=1e-4)
    assert largest_difference(twin_rows(twin), dense_run["rows"]) < 1e-4


@pytest.mark.parametrize(("stage", "keys_rate", "values_rate"), [(0, 1.0, 1.0), (0, 1.0, 4.0), (2, 0.5, 0.1)])
def test_sparse_touching_equals_a_float64_oracle(stage, keys_rate, values_rate):
    steps, max_norm = 30, 4.2
    scales = {"lr_scale": keys_rate, "value_lr_scale": values_rate / keys_rate}
    block = tiny_block({"gate": "softmax", "top_k": 2}, optimizer=scales)
    engine = build_engine(tiny_llama(), block, stage=stage, clip=max_norm, adam=ADAM, lr_scheduler=make_schedule)
    start = masters(engine)
    oracle = LazyAdamW(start)
    partly_touched, clipped = 0, 0
    for step in range(steps):
        engine.backward(lm_loss(engine, batch(step, size=1, length=5)))
        touched = row_gradients(engine)
        partly_touched += all(0 < len(rows) < table.rows / 2 for (rows, _), table in zip_with(touched, engine))
        norm = global_norm([*(grad for _, grad in touched.values()), *router_gradients(engine).values()])
        factor = clip_factor(norm, max_norm)
        clipped += factor < 1
        lr = ADAM["lr"] * warm_up_then_decay(step)
        rates = {name: lr * (values_rate if name.endswith("values") else keys_rate) for name in touched}
        oracle.step(touched, lambda name, rates=rates: {**ADAM, "lr": rates[name]}, factor)
        engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)

    assert partly_touched == steps and 0 < clipped < steps
    assert largest_difference(masters(engine), oracle.weights) < 2e-6
    for name, table in tables(engine).items():
        counted = engine.row_optimizer.state[table.handle]["step"]
        assert counted.tolist() == oracle.steps[name]
        assert len(set(counted.tolist())) > 2, f"the rows of {name} must differ in age for this to test anything"
        assert torch.equal(table.master[counted == 0], start[name][counted == 0])


def zip_with(touched: dict, engine) -> list:
    """Pairs of a table's gradient and the table."""
    return [(touched[name], table) for name, table in tables(engine).items() if name in touched]
