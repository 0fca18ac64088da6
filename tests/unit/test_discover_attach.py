"""Finding the FFNs of a model and attaching adapters to them, with the base as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from meft_engine.adapter import attach as attach_module
from meft_engine.adapter.attach import AttachedAdapters, attach
from meft_engine.adapter.discover import find_ffns
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.param_groups import freeze_base
from meft_engine.planner import host_bytes_needed, snapshot_bytes_needed
from tests.families import ODD_WIDTH, fill_values, keys_from, tiny_config, tiny_llama, token_ids

ALL = [f"model.layers.{i}.mlp" for i in range(3)]


def attached_to(model: torch.nn.Module, adapter: dict | None = None, **kwargs) -> AttachedAdapters:
    return attach(model, tiny_config(adapter), **{"compute_dtype": torch.float32, **kwargs})


@pytest.mark.parametrize("overrides", [{}, ODD_WIDTH], ids=["even", "odd"])
def test_names_and_tensors_of_the_base_stay(overrides):
    model = tiny_llama(**overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    attached = attached_to(model)
    after = model.state_dict()
    assert list(attached.adapters) == ALL
    assert set(after) - set(before) == {f"{name}.meft_adapter.router" for name in ALL}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [n for n, _ in model.named_modules() if "meft_adapter" not in n] == modules
    # Rows are no parameters, no buffers and in no state dict: nobody flattens, casts, broadcasts or saves them.
    rows = {table.master.data_ptr() for table in attached.tables()}
    held = [*model.parameters(), *model.buffers(), *after.values()]
    assert len(rows) == 6 and not rows & {tensor.data_ptr() for tensor in held}
    assert "rows=35, width=" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "none"])
def test_step_0_is_the_base_bit_for_bit(dtype, gate):
    model = tiny_llama(**ODD_WIDTH).to(dtype)
    ids = token_ids(3, 11)
    base = model(ids).logits
    attached = attached_to(model, {"gate": gate}, compute_dtype=dtype)
    assert torch.equal(model(ids).logits, base)
    assert all(a.router.dtype == dtype for a in attached.adapters.values())
    # It is not for want of activations.
    assert all(a.stats.active_rows > 0 for a in attached.adapters.values())
    fill_values(attached)
    assert not torch.equal(model(ids).logits, base)


@pytest.mark.parametrize(
    "adapter, expected",
    [
        ({}, ALL),
        ({"layers_to_transform": [2, 0]}, [ALL[0], ALL[2]]),
        ({"layers_to_transform": "1-2"}, ALL[1:]),
        ({"target_modules": ["mlp"]}, ALL),
        ({"target_modules": [r"layers\.[02]\.mlp"]}, [ALL[0], ALL[2]]),
        ({"target_modules": ["1.mlp", "model.layers.2.mlp"]}, ALL[1:]),
        ({"target_modules": ["mlp"], "layers_to_transform": [1]}, [ALL[1]]),
    ],
)
def test_which_ffns_are_adapted(adapter, expected):
    model = tiny_llama()
    attached = attached_to(model, adapter)
    assert list(attached.adapters) == expected
    model(token_ids(1, 5))
    has = {name for name in ALL if hasattr(model.get_submodule(name), "meft_adapter")}
    assert has == set(expected) and all(a.stats.micro_batches == 1 for a in attached.adapters.values())


@pytest.mark.parametrize(
    "adapter, sentence",
    [
        ({"layers_to_transform": [1, 3]}, "names layer 3, but the model's layers are 0 to 2$"),
        ({"layers_to_transform": "2-4"}, "names layer 4, but the model's layers are 0 to 2$"),
        ({"target_modules": ["ffn"]}, r"target_modules = \['ffn'\] matches none .* like \"model.layers.0.mlp\"$"),
        ({"target_modules": ["mlp.gate_proj"]}, r"target_modules = \['mlp.gate_proj'\] matches none"),
        ({"target_modules": ["layers.1"]}, r"target_modules = \['layers.1'\] matches none"),
        ({"target_modules": []}, r"target_modules = \[\] matches none"),
        ({"target_modules": ["0.mlp"], "layers_to_transform": [2]}, r"= \[2\] and .*\['0.mlp'\] have no FFN in common"),
        (
            {"target_modules": ["0.mlp"], "layers_to_transform": [7]},
            "names layer 7, but the model's layers are 0 to 2$",
        ),
    ],
)
def test_ffns_that_are_not_there_get_a_sentence(adapter, sentence):
    with pytest.raises(MeftConfigError, match=sentence):
        find_ffns(tiny_llama(), tiny_config(adapter).adapter)


class Mixer(torch.nn.Module):
    """A model that is built like nothing in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 12)) for _ in range(2)
        )
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.inner:
            x = x + block(x)
        return self.head(x)


def test_a_model_without_ffns_gets_a_sentence():
    with pytest.raises(MeftConfigError, match="no FFN found in Mixer; name the modules .* in adapter.target_modules$"):
        attached_to(Mixer())
    for pattern in ("head", "outer"):  # one gives another width than it takes
        with pytest.raises(MeftConfigError, match=f"= \\['{pattern}'\\] matches none of the model's modules$"):
            attached_to(Mixer(), {"target_modules": [pattern]})


def test_experts_that_are_laid_out_otherwise_are_not_taken_for_what_they_are_not():
    """GPT-OSS keeps [experts, d, 2 f], gate and up in turn: read as [experts, 2 f, d], keys would be too wide."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 97, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(MeftConfigError, match="no FFN found in GptOssForCausalLM"):
        attached_to(GptOssForCausalLM(GptOssConfig(**shape, **heads)))


def test_any_module_that_is_named_gets_an_adapter():
    model, x = Mixer(), torch.randn(2, 7, 12)
    before = model(x)
    settings = {"target_modules": [r"inner\.\d"], "init_keys": "ffn", "rows": 20, "num_experts": 5}
    attached = attached_to(model, settings)
    assert list(attached.adapters) == ["inner.0", "inner.1"]
    expected = keys_from(model.inner[1][0].weight, tiny_config(settings), layer=1)
    assert torch.equal(attached.adapters["inner.1"].keys.master, expected)
    assert torch.equal(model(x), before)
    fill_values(attached)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("first, second", [("", ""), ("", "model"), ("model", "")])
def test_a_second_attach_is_refused(first, second):
    """Also by way of a part of the model, or of the whole: a doubled hook would add the rows twice."""
    model, ids = tiny_llama(), token_ids(1, 5)
    fill_values(attached_to(model.get_submodule(first)))
    logits = model(ids).logits
    with pytest.raises(MeftConfigError, match="already has MEFT adapters; attach to a fresh model"):
        attached_to(model.get_submodule(second))
    assert torch.equal(model(ids).logits, logits)


def test_too_little_host_memory_is_refused_before_anything_is_allocated(monkeypatch):
    """The sentence names what is needed, what there is, and a number of rows that would do."""
    available = 1 << 30
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(attach_module, "PartiallyOffloadedTensor", lambda *a, **k: pytest.fail("allocated"))
    model, config = tiny_llama(), tiny_config({"rows": 1 << 21, "num_experts": 1 << 11})
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    needed = 3 * 2 * 2**21 * (32 * 12 + 4) / 2**30
    with pytest.raises(MeftConfigError) as caught:
        attach(model, config, compute_dtype=torch.float32)
    message = str(caught.value)
    assert message.startswith(
        f"adapter.rows = {1 << 21} in 3 layers needs {needed:.1f} GiB of host memory, and 1.0 GiB are available; "
    )
    rows = int(message.split("about ")[1].split()[0])
    for asked, fits in ((rows, True), (rows + 1, False)):
        smaller = tiny_config({"rows": asked, "num_experts": 1, "experts_per_token": 1, "gate": "none"})
        total = host_bytes_needed(smaller, 3, 32, compute_dtype=torch.float32, trainable=True)
        assert (total <= available) == fits
    assert "meft" not in model.__dict__ and not any("meft" in name for name, _ in model.named_modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_memory_for_copies_during_saves_counts_too(monkeypatch):
    """In the background alone, of every rank of the node, and never for more than all rows."""
    model, block = tiny_llama(), tiny_config()
    needed = host_bytes_needed(block, 3, 32, compute_dtype=torch.float32, trainable=True)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed + (1 << 16)))

    def config(**checkpoint) -> MeftConfig:
        return tiny_config(checkpoint=checkpoint)

    assert snapshot_bytes_needed(config(async_save=True, snapshot_bytes=9), needed, 3) == 27
    assert snapshot_bytes_needed(config(async_save=True, snapshot_bytes=1 << 50), needed, 3) == needed
    too_much = config(async_save=True, snapshot_bytes=1 << 17)
    with pytest.raises(MeftConfigError, match=r"needs .* GiB of host memory besides 0\.0 GiB for checkpoint\.snapshot"):
        attach(model, too_much, compute_dtype=torch.float32)
    attach(model, config(async_save=False, snapshot_bytes=1 << 17), compute_dtype=torch.float32)


def test_a_deep_copy_is_refused_with_a_sentence():
    model = tiny_llama()
    attached_to(model)
    with pytest.raises(RuntimeError, match="model.layers.0.mlp/keys cannot be deep-copied: .*; build the second"):
        copy.deepcopy(model)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.half().float()])
def test_casting_or_moving_the_model_leaves_the_rows(cast):
    model = tiny_llama()
    attached = attached_to(model)
    fill_values(attached)
    before = [(t.master, t.master.clone()) for t in attached.tables()]
    cast(model)
    for table, (master, values) in zip(attached.tables(), before, strict=True):
        assert table.master is master and table.compute_dtype == torch.float32
        assert master.dtype == torch.float32 and torch.equal(master, values)
    dtype = model.lm_head.weight.dtype
    assert all(a.router.dtype == dtype for a in attached.adapters.values())
    assert model(token_ids(1, 5)).logits.dtype == dtype


def test_inference_keeps_no_gradients_and_adds_no_trainable_parameter():
    model = tiny_llama().requires_grad_(False)
    attached = attached_to(model, trainable=False)
    fill_values(attached)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(token_ids(1, 5)).logits.requires_grad
    assert all(table.gradient() is None for table in attached.tables())


def test_freeze_base_freezes_everything_without_peft():
    model = tiny_llama()
    attached_to(model)
    freeze_base(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_peft_model_keeps_what_peft_trains():
    """LoRA also on the gate projection, whose frozen weight still gives the keys, and a module that PEFT saves."""
    model = tiny_llama(tie_word_embeddings=False)
    gates = [model.get_submodule(name).gate_proj.weight.clone() for name in ALL]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, settings).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ids = token_ids(2, 5)
    base = model(ids).logits
    attached = attached_to(model, {"init_keys": "ffn"})
    freeze_base(model)
    assert list(attached.adapters) == [f"base_model.model.{name}" for name in ALL]
    routers = {f"{name}.meft_adapter.router" for name in attached.adapters}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained | routers
    assert trained and all("lora" in name or "lm_head.modules_to_save" in name for name in trained)
    for index, (adapter, gate) in enumerate(zip(attached.adapters.values(), gates, strict=True)):
        assert torch.equal(adapter.keys.master, keys_from(gate, tiny_config({"init_keys": "ffn"}), index))
    assert torch.equal(model(ids).logits, base)
    fill_values(attached)
    model(ids).logits.square().mean().backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is not None for name in trained | routers)
    assert all(table.gradient().grad.abs().sum() > 0 for table in attached.tables())


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_what_inputs_meet_is_where_the_model_computes(balance):
    """Adapters are attached before DeepSpeed moves the model, and these are not moved with it."""
    config = tiny_config({"center_inputs": True}, router={"balance": balance})
    attached = attach(tiny_llama(), config, compute_dtype=torch.float32, device="meta")
    for adapter in attached.adapters.values():
        assert adapter.center.device.type == "meta"
        assert adapter.expert_bias is None or adapter.expert_bias.device.type == "meta"
        assert (adapter.expert_bias is not None) == (balance == "bias")
