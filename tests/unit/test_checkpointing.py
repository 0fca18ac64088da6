"""Activation checkpointing: the second run of a layer repeats the first one's selection, and nothing leaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from meft_engine.adapter import module as module_under_test
from meft_engine.adapter.attach import AttachedAdapters, attach
from meft_engine.offload.updates import StaleRowsError
from tests.families import fill_values, tiny_config, tiny_llama, token_ids

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def adapted(
    reentrant: bool | None, gate: str = "softmax", cap: int | None = None
) -> tuple[LlamaForCausalLM, AttachedAdapters]:
    """A model whose routers and rows train; ``None``: without checkpointing."""
    model = tiny_llama()
    config = tiny_config({"gate": gate}, active_rows={"cap": cap})
    attached = attach(model, config, compute_dtype=torch.float32)
    model.requires_grad_(False)
    for adapter in attached.adapters.values():
        adapter.router.requires_grad_(gate != "none")
    fill_values(attached)
    for table in attached.tables()[1::2]:
        # So that the versions of keys and values differ, and neither can pass for the other's.
        table.fill(table.master)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        # transformers 5 lets embeddings require grad here, earlier ones do not; it is for the adapters to see to.
        model.disable_input_require_grads()
    return model, attached


def loss_of(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False).logits.square().mean()


def gradients(attached: AttachedAdapters) -> dict[str, Tensor]:
    """Row ids, row gradients and router gradients, by name; they start from nothing afterwards."""
    found = {}
    for name, adapter in attached.adapters.items():
        if adapter.router.grad is not None:
            found[f"{name}/router"] = adapter.router.grad
            adapter.router.grad = None
    for table in attached.tables():
        gradient = table.gradient()
        found[f"{table.name} rows"], found[table.name] = gradient.rows, gradient.grad
        table.clear_gradient()
    return found


def plain_gradients(ids: Tensor, mask: Tensor | None = None, **kwargs) -> dict[str, Tensor]:
    model, attached = adapted(None, **kwargs)
    loss_of(model, ids, mask).backward()
    return gradients(attached)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(" rows"):
            assert found[name].tolist() == tensor.tolist(), name
        else:
            scale = factor * float(tensor.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], factor * tensor, rtol=1e-5, atol=1e-5 * scale)


@MODES
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("cap", [None, 5])
def test_gradients_are_those_without_checkpointing(reentrant, gate, cap):
    """Over a frozen base, where no input of the first layer would require grad; with padding; with a binding cap."""
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    model, attached = adapted(reentrant, gate, cap)
    runs = []
    for name in attached.ffns:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    loss_of(model, ids, mask).backward()
    assert sorted(runs) == sorted(2 * list(attached.ffns))
    found = gradients(attached)
    assert len(found) == (15 if gate != "none" else 12)
    assert_same(found, plain_gradients(ids, mask, gate=gate, cap=cap))
    assert len(found["model.layers.0.mlp/keys rows"]) == 5 if cap else True
    assert [a.stats.micro_batches for a in attached.adapters.values()] == [1, 1, 1]


@MODES
def test_embeddings_that_the_caller_passes(reentrant):
    """They require no grad, and the first layer's rows still get theirs."""
    ids = token_ids(2, 7)
    model, attached = adapted(reentrant, gate="none")
    embeddings = model.get_input_embeddings().weight[ids].detach()
    model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    assert not embeddings.requires_grad
    assert_same(gradients(attached), plain_gradients(ids, gate="none"))


@MODES
def test_the_selection_is_replayed(reentrant, monkeypatch):
    """Keys and routers turned round in between would choose other rows; the gradient is of those of the forward."""
    ids = token_ids(2, 11)
    expected = plain_gradients(ids)
    model, attached = adapted(reentrant)
    loss = loss_of(model, ids)
    for adapter in attached.adapters.values():
        # Below the versions: an update that is published is refused, which another test sees to.
        adapter.keys.master.neg_()
        adapter.router.data.neg_()
    monkeypatch.setattr(module_under_test, "choose_rows", lambda *_, **__: pytest.fail("routed again"))
    for adapter in attached.adapters.values():
        monkeypatch.setattr(adapter.stats, "count", lambda *_: pytest.fail("counted again"))
    loss.backward()
    found = gradients(attached)
    for name in expected:
        if name.endswith(" rows"):
            assert found[name].tolist() == expected[name].tolist()
    monkeypatch.undo()
    assert loss_of(model, ids).requires_grad
    assert {t.name: t.gradient() for t in attached.tables()} == dict.fromkeys(t.name for t in attached.tables())


def twin(ids: Tensor) -> Tensor:
    """The same tokens but for the very last one."""
    other = ids.clone()
    other[-1, -1] = 3 + (other[-1, -1] - 2) % 90
    return other


@MODES
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("shape", [(2, 7), (32, 32)])
def test_several_forwards_in_flight(reentrant, order, shape):
    """Two of them differ in a single token, among few tokens or among a thousand."""
    first = token_ids(*shape, seed=1)
    inputs = [first, twin(first), token_ids(*shape, seed=2)]
    assert [int((i != first).sum()) for i in inputs[:2]] == [0, 1]
    model, attached = adapted(reentrant)
    losses = [loss_of(model, ids) for ids in inputs]
    found = {}
    for index in order:
        losses[index].backward()
        found[index] = gradients(attached)
    for index, ids in enumerate(inputs):
        assert_same(found[index], plain_gradients(ids))


@MODES
def test_a_forward_without_gradient_in_between_does_not_disturb(reentrant):
    ids = token_ids(2, 7, seed=1)
    model, attached = adapted(reentrant)
    loss = loss_of(model, ids)
    with torch.no_grad():
        loss_of(model.eval(), twin(ids))
    model.train()
    loss.backward()
    assert_same(gradients(attached), plain_gradients(ids))


@MODES
def test_backward_twice_over_a_retained_graph(reentrant):
    ids = token_ids(2, 7)
    model, attached = adapted(reentrant)
    loss = loss_of(model, ids)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(attached), plain_gradients(ids), factor=2.0)


@pytest.fixture
def selections(monkeypatch) -> list[StorageWeakRef]:
    """Weak references to the memory of every selection that is made, whoever holds it: a record or the graph."""
    made, original = [], module_under_test.choose_rows

    def choose_rows(*args, **kwargs):
        selection, *rest = original(*args, **kwargs)
        made.append(StorageWeakRef(selection.picks.untyped_storage()))
        return selection, *rest

    monkeypatch.setattr(module_under_test, "choose_rows", choose_rows)
    return made


def alive(selections: list[StorageWeakRef]) -> int:
    """How many are still in memory, without the help of a garbage collection."""
    return sum(not reference.expired() for reference in selections)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_selections_are_freed_when_backward_ends(reentrant, selections):
    """Even while the loss and the output are still held, as training loops hold them for their logs."""
    model, _ = adapted(reentrant)
    output = model(token_ids(2, 7), use_cache=False)
    loss = output.logits.square().mean()
    assert alive(selections) == 3
    loss.backward(retain_graph=True)
    assert alive(selections) == 3
    loss.backward()
    assert alive(selections) == 0 and output.logits is not None


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_selections_are_freed_when_the_output_dies_without_backward(reentrant, selections):
    model, attached = adapted(reentrant)
    kept, dropped = loss_of(model, token_ids(2, 7, seed=1)), loss_of(model, token_ids(2, 7, seed=2))
    assert alive(selections) == 6
    del dropped
    assert alive(selections) == 3
    with torch.no_grad():
        without_graph = loss_of(model, token_ids(2, 7, seed=3))
    assert alive(selections) == 3 and len(selections) == 9 and without_graph.isfinite()
    kept.backward()
    assert_same(gradients(attached), plain_gradients(token_ids(2, 7, seed=1)))


def test_a_forward_that_fails_leaves_nothing_behind(selections):
    model, attached = adapted(False)
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, token_ids(2, 7))
    assert alive(selections) == 0 and len(selections) == 2
    handle.remove()
    loss_of(model, token_ids(2, 7)).backward()
    assert_same(gradients(attached), plain_gradients(token_ids(2, 7)))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_an_update_between_forward_and_backward_is_refused(reentrant, kind):
    """Of a single row, in the middle layer; the gradient would mix two versions of it."""
    model, attached = adapted(reentrant)
    loss = loss_of(model, token_ids(2, 7))
    table, row = getattr(attached.adapters["model.layers.1.mlp"], kind), torch.tensor([3])
    table.write(row, table.master[row])
    with pytest.raises(StaleRowsError, match=rf"model.layers.1.mlp/{kind} was updated .*; run backward before step"):
        loss.backward()


@MODES
def test_another_forward_inside_a_backward_is_refused(reentrant):
    """It repeats nothing that is in flight, though its shape would fit."""
    model, attached = adapted(reentrant)
    output = model(token_ids(2, 7, seed=1), use_cache=False).logits
    mlp = model.model.layers[1].mlp
    output.register_hook(lambda grad: mlp(torch.randn(2, 7, 32)).sum() * grad)
    with pytest.raises(RuntimeError, match="ran inside a backward, but repeats no forward in flight; run forwards out"):
        output.sum().backward()


def test_the_whole_model_under_one_checkpoint():
    """Non-reentrant, it works like any other; reentrant, there is no forward to repeat, which is said."""
    ids = token_ids(2, 7)
    model, attached = adapted(None)
    checkpoint(loss_of, model, ids, use_reentrant=False).backward()
    assert_same(gradients(attached), plain_gradients(ids))
    anchor = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda a: loss_of(model, ids) + a, anchor, use_reentrant=True)
    with pytest.raises(RuntimeError, match="repeats no forward in flight; .* checkpoint layers rather than the whole"):
        loss.backward()
