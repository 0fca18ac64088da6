"""Adapters by name on one plain model: which one acts, what it costs, and the base when none does."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import meft_engine
from meft_engine.adapter.attach import attach
from meft_engine.adapter.module import SparseAdapter
from meft_engine.checkpoint import export
from meft_engine.config import MeftConfigError
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_kernels import reference
from tests.families import FAMILIES, VOCAB, fill_values, tiny_config, tiny_llama, token_ids

BLOCKS = {
    "a": {},
    "b": {"rows": 24, "num_experts": 4, "top_k": 5, "gate": "none", "layers_to_transform": "1-2"},
    "c": {"gate": "sigmoid", "layers_to_transform": [0], "center_inputs": True},
}
"""Adapters of different shapes, in different layers."""

LISTED = r'\(its adapters: "a", "b", "c"\)'
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def build(name: str) -> tuple[LlamaForCausalLM, object]:
    """A model with one adapter of :data:`BLOCKS` alone, attached as for training, and that adapter."""
    model = tiny_llama().eval()
    attached = attach(model, tiny_config(BLOCKS[name]), compute_dtype=torch.float32)
    fill_values(attached, seed=ord(name))
    for adapter in attached.adapters.values():
        if adapter.center is not None:
            adapter.set_center(torch.linspace(-0.5, 0.5, 32))
    return model, attached


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter for each of :data:`BLOCKS`."""
    base = tmp_path_factory.mktemp("adapters")
    for name in BLOCKS:
        export.save_adapter(build(name)[1], base / name)
    return {name: base / name for name in BLOCKS}


def padded() -> dict[str, Tensor]:
    ids, mask = token_ids(3, 8, seed=4), torch.ones(3, 8, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**padded()).logits


def with_all(folders: dict[str, Path]) -> LlamaForCausalLM:
    model = tiny_llama().eval()
    for name, folder in folders.items():
        meft_engine.load_adapter(model, folder, name=name)
    return model


def state_of(model: nn.Module) -> tuple[list[str], int, list[str]]:
    """Names of modules, number of hooks, names in the state dict: what attaching must leave behind or take away."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return [name for name, _ in model.named_modules()], hooks, list(model.state_dict())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_selected_adapter_gives_what_it_gives_alone(name, folders):
    model = with_all(folders)
    meft_engine.set_adapter(model, name)
    assert meft_engine.active_adapter(model) == name
    assert torch.equal(logits(model), logits(build(name)[0]))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_selected_adapter_is_the_definition(name, folders):
    """Against the base with the reference added beside its FFNs, over padding on the left."""
    model, plain, config = with_all(folders), tiny_llama().eval(), tiny_config(BLOCKS[name]).adapter
    meft_engine.set_adapter(model, name)
    real = padded()["attention_mask"].flatten().bool()

    def add(adapter: SparseAdapter, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        y, _ = reference.adapter(
            args[0].reshape(-1, 32).double(),
            *(tensor.double() for tensor in (adapter.keys.master, adapter.values.master, adapter.router)),
            experts_per_token=config.experts_per_token,
            top_k=config.top_k,
            gate=config.gate,
            real=real,
            center=adapter.center.double() if adapter.center is not None else None,
        )
        return output + y.float().view_as(output)

    touched = 0
    for index, layer in enumerate(model.model.layers):
        adapter = getattr(layer.mlp, f"meft_adapter_{name}", None)
        if adapter is not None:
            plain.model.layers[index].mlp.register_forward_hook(lambda *a, adapter=adapter: add(adapter, *a))
            touched += 1
    assert touched == {"a": 3, "b": 2, "c": 1}[name]
    found, base = logits(model), logits(tiny_llama().eval())
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)


def test_the_first_acts_until_another_is_set(folders):
    model = with_all(folders)
    assert meft_engine.adapter_names(model) == list("abc") and meft_engine.active_adapter(model) == "a"
    first = logits(model)
    meft_engine.set_adapter(model, "c")
    meft_engine.set_adapter(model, "a")
    assert torch.equal(logits(model), first)


def test_names_are_in_the_order_of_loading_whatever_the_layers(folders):
    model = tiny_llama()
    for name in ("b", "c", "a"):
        meft_engine.load_adapter(model, folders[name], name=name)
    assert meft_engine.adapter_names(model) == ["b", "c", "a"]


def test_only_the_selected_adapter_costs_anything(folders, monkeypatch):
    """Of the others no row is read, no token routed and no mask looked at."""
    model = with_all(folders)
    meft_engine.set_adapter(model, "b")
    read: set[str] = set()
    adapters = {id(table): name for name, table in every_table(model)}
    reading = PartiallyOffloadedTensor.reading
    monkeypatch.setattr(
        PartiallyOffloadedTensor, "reading", lambda t, **kw: read.add(adapters[id(t)]) or reading(t, **kw)
    )
    ran: list[str] = []
    forward = SparseAdapter.forward
    monkeypatch.setattr(SparseAdapter, "forward", lambda a, h: ran.append(a.switch.name) or forward(a, h))
    logits(model)
    assert read == {"b"} and ran == ["b", "b"]
    ran.clear(), read.clear()
    with meft_engine.disable_adapter(model):
        logits(model)
    assert not read and not ran


def every_table(model: nn.Module) -> list[tuple[str, PartiallyOffloadedTensor]]:
    adapters = [module for module in model.modules() if isinstance(module, SparseAdapter)]
    return [(adapter.switch.name, table) for adapter in adapters for table in (adapter.keys, adapter.values)]


def test_disabled_is_the_base_bit_for_bit(folders):
    model, base = with_all(folders), tiny_llama().eval()
    adapted = logits(model)
    with meft_engine.disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
        assert torch.equal(model.generate(**padded(), **GREEDY), base.generate(**padded(), **GREEDY))
        assert meft_engine.active_adapter(model) == "a"
        meft_engine.set_adapter(model, "b")
        assert torch.equal(logits(model), logits(base)), "choosing one does not enable it"
        with meft_engine.disable_adapter(model):
            pass
        assert torch.equal(logits(model), logits(base)), "the inner one restores what it found"
    meft_engine.set_adapter(model, "a")
    assert torch.equal(logits(model), adapted)


def test_a_disabled_model_takes_what_the_base_takes(folders):
    """A 4-dimensional mask tells an adapter nothing of padding, and is no concern of the base's."""
    model, base = with_all(folders), tiny_llama().eval()
    inputs = {"input_ids": token_ids(2, 5), "attention_mask": torch.zeros(2, 1, 5, 5)}
    with pytest.raises(ValueError, match="4-dimensional"):
        model(**inputs)
    with meft_engine.disable_adapter(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_after_an_exception_the_adapter_acts_again(folders):
    model = with_all(folders)
    adapted = logits(model)
    with pytest.raises(KeyError), meft_engine.disable_adapter(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


def test_switched_off_for_good_and_on_again(folders):
    model, base = with_all(folders), logits(tiny_llama().eval())
    adapted = logits(model)
    meft_engine.disable_adapter_layers(model)
    assert torch.equal(logits(model), base)
    with meft_engine.disable_adapter(model):
        pass
    assert torch.equal(logits(model), base), "leaving the context must not enable what was disabled before it"
    meft_engine.load_adapter(model, folders["b"], name="late")
    assert torch.equal(logits(model), base), "an adapter that joins a disabled model is disabled"
    meft_engine.enable_adapter_layers(model)
    assert torch.equal(logits(model), adapted)


def test_adapters_that_come_or_go_while_disabled(folders):
    model = tiny_llama().eval()
    meft_engine.load_adapter(model, folders["a"], name="a")
    with meft_engine.disable_adapter(model):
        meft_engine.load_adapter(model, folders["b"], name="b")
        with pytest.warns(UserWarning, match='"b" is active now'):
            meft_engine.unload_adapter(model, "a")
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    assert torch.equal(logits(model), logits(build("b")[0]))
    with meft_engine.disable_adapter(model):
        meft_engine.unload_adapter(model)


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_unloading_in_any_order_ends_at_the_base(order, folders):
    base = tiny_llama().eval()
    model = with_all(folders)
    left = list("abc")
    tables = every_table(model)
    for name in order:
        active = meft_engine.active_adapter(model)
        left.remove(name)
        if name == active and left:
            with pytest.warns(UserWarning, match=f'"{name}" was active and is unloaded; "{left[0]}" is active now'):
                meft_engine.unload_adapter(model, name)
        else:
            assert meft_engine.unload_adapter(model, name) is model
        assert meft_engine.adapter_names(model) == left
        if left:
            expected = left[0] if name == active else active
            assert meft_engine.active_adapter(model) == expected
            assert torch.equal(logits(model), logits(build(expected)[0]))
    assert meft_engine.active_adapter(model) is None
    assert state_of(model) == state_of(base) and torch.equal(logits(model), logits(base))
    assert all(table._host is None for _, table in tables), "memory goes back"


def test_unloading_without_a_name_takes_all_off(folders):
    base, model = tiny_llama().eval(), with_all(folders)
    meft_engine.unload_adapter(model)
    assert state_of(model) == state_of(base) and torch.equal(logits(model), logits(base))


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda m, f: meft_engine.set_adapter(m, "x"), r"no adapter named 'x' \(its adapters: \"a\", \"b\", \"c\"\)$"),
        (lambda m, f: meft_engine.set_adapter(m, 3), r"no adapter named 3 \(its adapters: \"a\", \"b\", \"c\"\)$"),
        (
            lambda m, f: meft_engine.unload_adapter(m, "x"),
            r"no adapter named 'x' \(its adapters: \"a\", \"b\", \"c\"\)$",
        ),
        (
            lambda m, f: meft_engine.load_adapter(m, f["a"], name="b"),
            rf'already has an adapter named "b" {LISTED}; unload it first',
        ),
        (lambda m, f: meft_engine.load_adapter(m, f["a"], name="v1.2"), "name = 'v1.2' cannot name an adapter"),
        (lambda m, f: meft_engine.load_adapter(m, f["a"], name=""), "name = '' cannot name an adapter"),
        (lambda m, f: meft_engine.load_adapter(m, f["a"], name=None), "name = None cannot name an adapter"),
        (
            lambda m, f: meft_engine.load_adapter(m, f["a"], name="d", rows="gpu"),
            'rows = \'gpu\' .* "host" or "device"',
        ),
    ],
)
def test_what_cannot_be_gets_a_sentence_and_changes_nothing(act, sentence, folders, monkeypatch):
    model = with_all(folders)
    before, found = state_of(model), logits(model)
    monkeypatch.setattr("meft_engine.inference.attach", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(MeftConfigError, match=sentence):
        act(model, folders)
    assert state_of(model) == before and torch.equal(logits(model), found)


@pytest.mark.parametrize(
    "act",
    [
        lambda m: meft_engine.set_adapter(m, "a"),
        meft_engine.disable_adapter_layers,
        meft_engine.enable_adapter_layers,
        lambda m: meft_engine.disable_adapter(m).__enter__(),
        lambda m: meft_engine.unload_adapter(m, "a"),
        meft_engine.unload_adapter,
    ],
)
def test_a_plain_model_has_no_adapters(act):
    model = tiny_llama()
    assert meft_engine.adapter_names(model) == [] and meft_engine.active_adapter(model) is None
    with pytest.raises(MeftConfigError, match="this LlamaForCausalLM has no MEFT adapters"):
        act(model)


@pytest.mark.parametrize("others", [[], ["b"]], ids=["fresh", "with another"])
def test_a_refused_adapter_leaves_the_model_as_it_was(others, folders):
    """Another base, files that are cut off, memory that runs out in the middle."""
    other = tiny_llama(seed=1).eval()
    before, found = state_of(other), logits(other)
    with pytest.raises(MeftConfigError, match="another base model"):
        meft_engine.load_adapter(other, folders["a"])
    assert state_of(other) == before and torch.equal(logits(other), found)

    model = tiny_llama().eval()
    for name in others:
        meft_engine.load_adapter(model, folders[name], name=name)
    before, found = state_of(model), logits(model)
    places = {"checkpoint.adapter_files.fill": 1, "adapter.attach.initial_router": 1, "adapter.attach.listen": 3}
    for place, call in places.items():
        fail = interrupted(place, call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"meft_engine.{place}", fail)
            with pytest.raises(KeyboardInterrupt):
                meft_engine.load_adapter(model, folders["a"], name="new")
        assert state_of(model) == before and torch.equal(logits(model), found), place
        assert meft_engine.adapter_names(model) == others
    meft_engine.load_adapter(model, folders["a"], name="new")
    assert meft_engine.adapter_names(model) == [*others, "new"]


def interrupted(place: str, call: int) -> Callable:
    """The function of that name in ``meft_engine``, which is interrupted when it is called for the ``call``-th time."""
    module, _, name = f"meft_engine.{place}".rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return fail


def test_training_takes_one_adapter_on_a_fresh_model(folders):
    model = tiny_llama()
    meft_engine.load_adapter(model, folders["a"], name="a")
    with pytest.raises(MeftConfigError, match="already has MEFT adapters; attach to a fresh model"):
        attach(model, tiny_config(), compute_dtype=torch.float32, name="b")
    trained, _ = build("a")
    for name in ("default", "b"):
        with pytest.raises(MeftConfigError, match="is being trained; load others into a fresh model"):
            meft_engine.load_adapter(trained, folders["b"], name=name)
    assert [n for n in trained.state_dict() if "meft" in n] == [
        f"model.layers.{i}.mlp.meft_adapter.router" for i in range(3)
    ]


def test_the_adapter_that_is_trained_can_be_disabled():
    """Such as for the logits of a reference model, in preference learning."""
    model, attached = build("a")
    base = logits(tiny_llama().eval())
    model.train()
    with meft_engine.disable_adapter(model):
        assert torch.equal(model(**padded()).logits, base)
        assert all(adapter.stats.micro_batches == 0 for adapter in attached.adapters.values())
    model(**padded()).logits.square().mean().backward()
    assert all(table.gradient() is not None for table in attached.tables())


@pytest.mark.parametrize("place", ["host", "device"])
def test_rows_are_where_they_were_asked_to_be(place, folders):
    model = meft_engine.load_adapter(tiny_llama().eval(), folders["a"], rows=place)
    adapters = [module for module in model.modules() if isinstance(module, SparseAdapter)]
    assert all(a.keys.resident and a.values.resident == (place == "device") for a in adapters)
    assert torch.equal(logits(model), logits(build("a")[0]))
    assert all((a.values.bytes_to_device == 0) == (place == "device") for a in adapters)


def test_rows_serve_the_device_that_the_model_moves_to(folders):
    """To a device that holds nothing and back: what is there has to be asked for anew from the host."""
    model = with_all(folders)
    meft_engine.set_adapter(model, "c")
    expected, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = [table for _, table in every_table(model)]
    rows = [table.planes()[0] for table in tables]
    model.to("meta")
    assert all(table.device.type == "meta" and table.gather(torch.arange(3)).is_meta for table in tables)
    assert [table._on_device is not None for table in tables] == [table.resident for table in tables]
    adapter = model.model.layers[0].mlp.meft_adapter_c
    assert adapter.center.is_meta
    adapter.__dict__["center"] = torch.linspace(-0.5, 0.5, 32)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.model.rotary_emb = tiny_llama().model.rotary_emb
    assert torch.equal(logits(model), expected)
    assert all(table.planes()[0] is row for table, row in zip(tables, rows, strict=True))


def test_layers_whose_ends_are_apart(tmp_path):
    """OPT's FFNs are listened to in two places."""
    family = FAMILIES["OPT"]
    for name, seed in (("a", 1), ("b", 2)):
        attached = attach(family.model(), tiny_config(), compute_dtype=torch.float32)
        fill_values(attached, seed=seed)
        export.save_adapter(attached, tmp_path / name)
    model, base = family.model().eval(), logits(family.model().eval())
    alone = []
    for name in ("a", "b"):
        alone.append(logits(meft_engine.load_adapter(family.model().eval(), tmp_path / name)))
        meft_engine.load_adapter(model, tmp_path / name, name=name)
    assert torch.equal(logits(model), alone[0])
    meft_engine.set_adapter(model, "b")
    assert torch.equal(logits(model), alone[1]) and not torch.equal(*alone)
    with meft_engine.disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), alone[1])


def test_generation_with_a_cache_and_padding(folders):
    """Each prompt goes on as it does alone, unpadded and without a cache."""
    model = with_all(folders)
    for name in ("b", "a"):
        meft_engine.set_adapter(model, name)
        together = model.generate(**padded(), **GREEDY)[:, -6:]
        for row, (ids, mask) in enumerate(zip(*padded().values(), strict=True)):
            prompt = ids[mask.bool()][None]
            alone = build(name)[0].generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **GREEDY)
            assert together[row].tolist() == alone[0, -6:].tolist()


def test_switched_during_generation(folders):
    """A stopping rule that disables the adapter after two tokens: the rest is the base's."""
    model, base = with_all(folders), tiny_llama().eval()
    prompt = token_ids(1, 5)
    settings = {**GREEDY, "attention_mask": torch.ones_like(prompt), "use_cache": False}

    def stop(ids: Tensor, scores: Tensor, **_) -> bool:
        if ids.shape[1] == 7:
            meft_engine.disable_adapter_layers(model)
        return False

    found = model.generate(prompt, stopping_criteria=[stop], **settings)
    meft_engine.enable_adapter_layers(model)
    adapted = model.generate(prompt, **settings)
    assert torch.equal(found[:, :7], adapted[:, :7])
    settings.update(max_new_tokens=4, min_new_tokens=4, attention_mask=torch.ones(1, 7, dtype=torch.int64))
    assert torch.equal(found, base.generate(found[:, :7], **settings))
    assert not torch.equal(found, adapted)


def test_a_pipeline(folders):
    """`pipeline` pads batches on the left and generates as `generate` does."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
    model = with_all(folders)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w9 w30 w7", "w11"]
    answers = pipe(prompts, batch_size=2, return_full_text=False, **GREEDY)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        alone = build("a")[0].generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
        found = [int(number) for number in re.findall(r"w(\d+)", answer[0]["generated_text"])]
        assert found == [token for token in alone[0, -6:].tolist() if token]
