"""Activation checkpointing changes nothing but memory, in both of PyTorch's modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    largest_difference,
    lm_loss,
    masters,
    routers,
    row_gradients,
    tables,
    train_step,
)

STEPS, GAS = 5, 2
ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def make_engine(stage: int, gate: str, use_reentrant: bool | None, dropout: float = 0.0, rows: int = 35):
    model = tiny_llama(attention_dropout=dropout)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
        # transformers 5 lets embeddings require grad here, earlier ones do not; it is for the adapters to see to.
        model.disable_input_require_grads()
    engine = build_engine(model, tiny_block({"gate": gate, "rows": rows}), stage=stage, gas=GAS, clip=0.5, adam=ADAM)
    fill_values(engine.meft_adapters)
    return engine


def run(engine) -> dict:
    torch.manual_seed(5)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(train_step(engine, [batch(10 * step + micro) for micro in range(GAS)]))
        norms.append(engine.get_global_grad_norm())
    return {
        "losses": losses,
        "norms": norms,
        "rows": masters(engine),
        "routers": {name: router.detach().clone() for name, router in routers(engine).items()},
        "steps": {n: engine.row_optimizer.state[t.handle]["step"].clone() for n, t in tables(engine).items()},
        "counted": [(a.stats.micro_batches, a.stats.active_rows) for a in engine.meft_adapters.adapters.values()],
    }


@pytest.fixture(scope="module")
def plain_runs() -> dict:
    return {}


@pytest.mark.parametrize("gate", ["softmax", "none"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_training_equals_plain_training(use_reentrant, stage, gate, plain_runs):
    """With attention dropout, so that the recomputation has to restore the random state too."""
    if (stage, gate) not in plain_runs:
        plain_runs[stage, gate] = run(make_engine(stage, gate, None, dropout=0.2))
    plain, checkpointed = plain_runs[stage, gate], run(make_engine(stage, gate, use_reentrant, dropout=0.2))
    assert checkpointed["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert checkpointed["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    for kind in ("rows", "routers", "steps"):
        assert largest_difference(checkpointed[kind], plain[kind]) < 1e-5
    # Recomputations are not counted again.
    assert checkpointed["counted"] == plain["counted"]


@pytest.mark.parametrize("gate", ["softmax", "none"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_rows_of_the_first_layer_get_gradient(given, use_reentrant, stage, gate):
    """Over a frozen base no input of the first layer requires grad, where reentrant checkpointing builds no graph."""
    engine, ids = make_engine(stage, gate, use_reentrant), batch(1)
    inputs = ids if given == "input_ids" else engine.module.get_input_embeddings().weight[ids].detach()
    engine.backward(engine(**{given: inputs}, labels=ids, use_cache=False).loss)
    gradients = row_gradients(engine)
    for kind in ("keys", "values"):
        rows, grad = gradients[f"model.layers.0.mlp/{kind}"]
        # All but rows that only a last token picked, of which no loss is asked.
        assert rows.numel() > 3 and (grad.abs().amax(1) > 1e-5).float().mean() > 0.9


def mover(moves: Callable[[], bool], moved: list[torch.nn.Module]) -> Callable:
    """A hook that adds noise to an FFN's input when ``moves()``, and notes that it has."""

    def hook(ffn: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if not moves():
            return None
        moved.append(ffn)
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
        # Adding a constant saves no tensor, so that both passes still save the same ones.
        return (args[0] + 0.01 * args[0].detach().norm() / noise.norm() * noise,)

    return hook


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_selection_is_replayed_though_rounding_has_moved_the_input(use_reentrant):
    """Here by far more than rounding would: a hook moves the FFN's input by 1 %, in the recomputation alone."""
    ids, selections = batch(1, size=1, length=10), {}
    for name, moves in (
        ("as it is", lambda: False),
        ("moved always", lambda: True),
        ("moved in the recomputation", lambda: torch._C._current_graph_task_id() != -1),
    ):
        engine, moved = make_engine(0, "softmax", use_reentrant, rows=300), []
        for ffn in engine.meft_adapters.ffns.values():
            ffn.module.register_forward_pre_hook(mover(moves, moved))
        engine.backward(lm_loss(engine, ids))
        selections[name] = {n: rows.tolist() for n, (rows, _) in row_gradients(engine).items()}
        assert bool(moved) == (name != "as it is")
    assert selections["moved always"] != selections["as it is"], "the hook must be able to change a choice"
    assert selections["moved in the recomputation"] == selections["as it is"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_forwards_in_flight_before_one_backward(use_reentrant):
    """Each recomputation must find the selection of its own forward: losses of two batches, summed (DPO does this)."""
    runs = []
    for mode in (None, use_reentrant):
        engine = make_engine(0, "softmax", mode)
        total = lm_loss(engine, batch(1)) + lm_loss(engine, batch(2))
        engine.backward(total)
        runs.append(row_gradients(engine))
    plain, checkpointed = runs
    assert plain.keys() == checkpointed.keys()
    for name, (rows, grad) in plain.items():
        assert torch.equal(rows, checkpointed[name][0])
        torch.testing.assert_close(grad, checkpointed[name][1], rtol=1e-4, atol=1e-6)
