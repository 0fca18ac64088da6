"""Evaluation leaves everything alone and knows no cap; an adapter without trainable routers trains by an anchor."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    largest_difference,
    lm_loss,
    masters,
    routers,
    row_gradients,
    tables,
    train_step,
)

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.2}


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, True)])
def test_evaluation_changes_nothing(stage, bf16, no_grad):
    """Between two steps, and between two micro-steps of one window, with and without autograd."""
    engine, control = (build_engine(tiny_llama(), adam=ADAM, stage=stage, bf16=bf16, gas=2) for _ in range(2))
    for one in (engine, control):
        fill_values(one.meft_adapters)
        train_step(one, [batch(1), batch(2)])
        one.backward(lm_loss(one, batch(3)))
        one.step()
    before, stats = full_state(engine), copy.deepcopy(stats_of(engine))
    pending, random_state = row_gradients(engine), torch.get_rng_state()

    engine.eval()
    for seed in (4, 5):
        with torch.set_grad_enabled(not no_grad):
            assert lm_loss(engine, batch(seed)).isfinite()
    assert differing(before, full_state(engine)) == []
    assert stats_of(engine) == stats
    assert torch.equal(torch.get_rng_state(), random_state)
    after = row_gradients(engine)
    assert pending.keys() == after.keys() and pending
    assert all(torch.equal(pending[n][part], after[n][part]) for n in pending for part in (0, 1))

    engine.train()
    for one in (engine, control):
        one.backward(lm_loss(one, batch(6)))
        one.step()
    assert differing(full_state(engine), full_state(control)) == []
    # Rows have travelled for evaluation, too.
    unlike = {"host_bytes_measured": 0, "traffic": {}}
    assert engine.meft_report() | unlike == control.meft_report() | unlike


def stats_of(engine) -> list[tuple]:
    stats = [adapter.stats for adapter in engine.meft_adapters.adapters.values()]
    return [(s.micro_batches, s.active_rows, None if s.mass is None else s.mass.tolist()) for s in stats]


def test_the_cap_never_binds_in_evaluation():
    shape = {"top_k": 3, "gate": "sigmoid"}
    capped = build_engine(tiny_llama(), tiny_block(shape, active_rows={"cap": 4}))
    free = build_engine(tiny_llama(), tiny_block(shape))
    for engine in (capped, free):
        fill_values(engine.meft_adapters)
    ids = batch(1)
    with torch.no_grad():
        in_training = capped(input_ids=ids).logits, free(input_ids=ids).logits
        assert capped.meft_report()["kept_mass"] < 0.9, "the cap must bind in training for this to test anything"
        for engine in (capped, free):
            engine.eval()
        in_evaluation = capped(input_ids=ids).logits, free(input_ids=ids).logits
    assert (in_training[0] - in_training[1]).abs().max() > 0.1
    assert torch.equal(*in_evaluation)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (2, False), (2, True)])
def test_gate_none_trains_rows_alone(stage, bf16, layers):
    """DeepSpeed gets an anchor to own, which stays zero; routers keep every bit under weight decay."""
    block = tiny_block({"gate": "none", "layers_to_transform": layers})
    engine = build_engine(tiny_llama(), block, stage=stage, bf16=bf16, adam=ADAM, clip=0.5)
    start, first_routers = masters(engine), {n: r.detach().clone() for n, r in routers(engine).items()}
    losses, norms = [], []
    for _ in range(8):
        losses.append(lm_loss(engine, batch(1)))
        engine.backward(losses[-1])
        gradients = [grad for _, grad in row_gradients(engine).values()]
        engine.step()
        norms.append((engine.get_global_grad_norm(), sum(float(g.double().square().sum()) for g in gradients) ** 0.5))
    assert losses[-1] < losses[0] - 0.1
    for reported, of_rows in norms:
        assert reported == pytest.approx(of_rows, rel=1e-5), "the anchor must add nothing to the norm"
    for name, rows in masters(engine).items():
        # All but rows that only a last token picked, of which no loss is asked.
        touched = engine.row_optimizer.state[tables(engine)[name].handle]["step"] > 0
        assert (rows - start[name])[touched].abs().amax(1).median() > 1e-2
        assert torch.equal(rows[~touched], start[name][~touched])
    for name, router in routers(engine).items():
        assert not router.requires_grad and torch.equal(router, first_routers[name])
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    assert [p.shape for p in trainable] == [torch.Size([1])] and not trainable[0].detach().any()


def test_gate_none_is_the_same_in_stages_0_and_2():
    runs = []
    for stage in (0, 2):
        engine = build_engine(tiny_llama(), tiny_block({"gate": "none"}), stage=stage, adam=ADAM, clip=0.5, bf16=True)
        for step in range(5):
            train_step(engine, [batch(step % 2)])
        runs.append(masters(engine))
    assert largest_difference(*runs) < 1e-4
