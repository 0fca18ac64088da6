"""MEFT as a method of PEFT: the same logits and files as without it, PEFT's own words for everything."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import meft_engine
from meft_engine import after_import
from meft_engine.adapter.attach import AttachedAdapters, attach
from meft_engine.checkpoint.export import save_adapter
from meft_engine.config import AdapterConfig, MeftConfigError
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.peft import MeftConfig
from tests.families import FAMILIES, fill_values, tiny_config, tiny_llama, token_ids

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {
    "a": {"center_inputs": True},
    "b": {"rows": 24, "num_experts": 4, "gate": "none", "layers_to_transform": "1-2", "target_modules": ["mlp"]},
}
SHAPE = {"rows": 35, "num_experts": 5, "experts_per_token": 2, "top_k": 3, "init_keys": "random"}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def adapted(model: nn.Module, block: dict, dtype: torch.dtype, **sections) -> AttachedAdapters:
    attached = attach(model, tiny_config(block, **sections), compute_dtype=dtype)
    fill_values(attached, seed=len(block))
    for adapter in attached.adapters.values():
        if adapter.center is not None:
            adapter.set_center(torch.linspace(-0.5, 0.5, 32))
        if adapter.expert_bias is not None:
            adapter.expert_bias.copy_(torch.linspace(-2, 2, 5))
    return attached


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base model, whose path models and adapters then remember."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, block in BLOCKS.items():
        save_adapter(adapted(load(base), block, torch.float32), folder / name)
    balanced = adapted(load(base), {}, torch.float32, router={"balance": "bias"})
    save_adapter(balanced, folder / "bias")
    save_adapter(adapted(load(base), {}, torch.bfloat16), folder / "bf16 rows")
    return {name: folder / name for name in (*BLOCKS, "bias", "bf16 rows")}


def load(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids, mask = token_ids(3, 8, seed=4), torch.ones(3, 8, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 0, 0
    return model(input_ids=ids, attention_mask=mask).logits


def expected(base: Path, folder: Path) -> Tensor:
    return logits(meft_engine.load_adapter(load(base), folder))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Loading


@pytest.mark.parametrize("name", ["a", "b", "bias", "bf16 rows"])
def test_from_pretrained_gives_the_logits_of_load_adapter(name, base, folders, recwarn):
    model = peft.PeftModel.from_pretrained(load(base), folders[name])
    assert type(model) is peft.PeftModelForCausalLM and not model.training
    assert torch.equal(logits(model), expected(base, folders[name]))
    assert not torch.equal(logits(model), logits(load(base)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not [str(w.message) for w in recwarn if "meft" in str(w.message).lower()]


def test_auto_peft_finds_the_base_and_loads_both(base, folders, recwarn):
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folders["a"], dtype=torch.float32)
    assert torch.equal(logits(model), expected(base, folders["a"]))
    assert not [str(w.message) for w in recwarn if "nexpected keyword" in str(w.message)]
    described = json.loads((folders["a"] / "adapter_config.json").read_text())
    assert described["peft_type"] == "MEFT" and described["base_model_name_or_path"] == str(base)
    assert described["task_type"] == "CAUSAL_LM" and described["inference_mode"] is True
    assert {"revision", "target_modules", "auto_mapping"} <= set(described)


def test_generation_through_peft(base, folders):
    ids = token_ids(1, 5)
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    found = peft.PeftModel.from_pretrained(load(base), folders["a"]).generate(**settings)
    assert torch.equal(found, meft_engine.load_adapter(load(base), folders["a"]).generate(**settings))


def test_rows_are_no_parameters_and_never_loaded_as_a_state_dict(base, folders, monkeypatch):
    monkeypatch.setattr("peft.peft_model.load_peft_weights", lambda *a, **k: pytest.fail("all rows in one piece"))
    model = peft.PeftModel.from_pretrained(load(base), folders["a"])
    tables = [t for attached in model.base_model.attached.values() for t in attached.tables()]
    held = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers(), *model.state_dict().values()]}
    before = [table.master for table in tables]
    assert len(tables) == 6 and not held & {master.data_ptr() for master in before}
    model.bfloat16()
    assert all(t.master.data_ptr() == master.data_ptr() for t, master in zip(tables, before, strict=True))


def test_an_encoder_decoder(tmp_path):
    family = FAMILIES["T5"]
    save_adapter(adapted(family.model(), {}, torch.float32), tmp_path)
    inputs = {"input_ids": token_ids(2, 6), "labels": token_ids(2, 4, seed=1)}
    model = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    assert type(model) is peft.PeftModelForSeq2SeqLM
    with torch.no_grad():
        plain = meft_engine.load_adapter(family.model().eval(), tmp_path)(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_refused_adapter_leaves_the_model_as_it_was(first, base, folders):
    other = tiny_llama(seed=1).eval()
    before = (hooks(other), list(other.state_dict()), logits(other))
    if first:
        with pytest.raises(MeftConfigError, match="another base model"):
            peft.PeftModel.from_pretrained(other, folders["a"])
        assert not hasattr(other, "peft_config")
    else:
        own = adapted(tiny_llama(seed=1), {}, torch.float32)
        save_adapter(own, folders["a"].parent / "own")
        model = peft.PeftModel.from_pretrained(other, folders["a"].parent / "own", adapter_name="own")
        before = (hooks(other), list(other.state_dict()), logits(model))
        with pytest.raises(MeftConfigError, match="another base model"):
            model.load_adapter(folders["a"], "a")
        assert list(model.peft_config) == ["own"] and torch.equal(logits(model), before[2])
    assert (hooks(other), list(other.state_dict())) == before[:2] and torch.equal(logits(other), before[2])


def test_missing_files_get_a_sentence(base, folders, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((folders["a"] / "adapter_config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        peft.PeftModel.from_pretrained(load(base), tmp_path)
    model = peft.PeftModel.from_pretrained(load(base), folders["a"])
    with pytest.raises(MeftConfigError, match="low_cpu_mem_usage = True cannot be used"):
        peft.PeftModel.from_pretrained(load(base), folders["a"], low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected(base, folders["a"]))


# Several


def test_several_adapters_in_the_words_of_peft(base, folders):
    model = peft.PeftModel.from_pretrained(load(base), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    assert torch.equal(logits(model), expected(base, folders["a"])) and model.active_adapters == ["a"]
    model.set_adapter("b")
    assert torch.equal(logits(model), expected(base, folders["b"])) and model.active_adapter == "b"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(base)))
    assert torch.equal(logits(model), expected(base, folders["b"]))
    model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(load(base))) and model.get_model_status().enabled is False
    with model.disable_adapter():
        pass
    assert model.get_model_status().enabled is False
    model.enable_adapter_layers()
    status = model.get_model_status()
    assert status.enabled is True and status.available_adapters == ["a", "b"] and status.active_adapters == ["b"]
    assert status.peft_types == {"a": "MEFT", "b": "MEFT"} and status.num_adapter_layers == 3
    with pytest.warns(UserWarning, match='"a" is active now'):
        model.delete_adapter("b")
    assert model.active_adapter == "a" and torch.equal(logits(model), expected(base, folders["a"]))
    unwrapped = model.unload()
    assert type(unwrapped) is LlamaForCausalLM and torch.equal(logits(unwrapped), logits(load(base)))
    assert hooks(unwrapped) == 0 and not hasattr(unwrapped, "peft_config")


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda m: m.merge_and_unload(), "cannot be merged into its base"),
        (lambda m: m.merge_adapter(), "cannot be merged into its base"),
        (lambda m: m.base_model.set_adapter(["default", "b"]), "names 2 adapters; one MEFT adapter acts at a time"),
        (lambda m: m.set_requires_grad("default"), "loaded for inference and cannot learn"),
        (lambda m: peft.get_peft_model_state_dict(m), "in no state dict; save it with save_pretrained"),
        (lambda m: peft.set_peft_model_state_dict(m, {}), "in no state dict; load it with"),
        (lambda m: m.save_pretrained("x", safe_serialization=False), "never pickled"),
        (
            lambda m: m.save_pretrained("x", selected_adapters=["b"]),
            r"names \['b'\], and the adapters are \['default'\]",
        ),
        (lambda m: m.add_adapter("b", MeftConfig(**SHAPE)), "already has MEFT adapters; attach to a fresh model"),
        (lambda m: m.add_adapter("b", MeftConfig(rows=10**9, inference_mode=True)), "GiB of host memory"),
    ],
)
def test_what_peft_offers_and_meft_cannot_do_gets_a_sentence(act, sentence, base, folders):
    model = peft.PeftModel.from_pretrained(load(base), folders["a"])
    with pytest.raises(MeftConfigError, match=sentence):
        act(model)
    assert torch.equal(logits(model), expected(base, folders["a"])) and list(model.peft_config) == ["default"]
    assert not Path("x").exists()


# Saving


@pytest.mark.parametrize("name", ["a", "bias", "bf16 rows"])
def test_save_pretrained_writes_the_files_that_it_was_loaded_from(name, base, folders, tmp_path):
    model = peft.PeftModel.from_pretrained(load(base), folders[name])
    model.save_pretrained(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in folders[name].iterdir())
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (folders[name], tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((f / "adapter_config.json").read_text()) for f in (folders[name], tmp_path))
    assert one == other


def test_adapters_of_other_names_are_saved_in_folders(base, folders, tmp_path):
    model = peft.PeftModel.from_pretrained(load(base), folders["a"])
    model.load_adapter(folders["b"], adapter_name="b")
    model.save_pretrained(tmp_path / "all")
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "all", subfolder="b", adapter_name="again")
    assert torch.equal(logits(again), expected(base, folders["b"]))
    assert torch.equal(expected(base, tmp_path / "all"), expected(base, folders["a"]))
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()


# Building


def test_the_fields_are_those_of_the_block():
    assert MeftConfig().block() == meft_engine.MeftConfig()
    named = {name: getattr(MeftConfig(), name) for name in AdapterConfig.model_fields}
    assert named == AdapterConfig().model_dump()
    config = MeftConfig(rows=64, target_modules={"mlp"}, router={"balance": "bias"}, task_type="CAUSAL_LM")
    assert config.block() == meft_engine.MeftConfig.from_block(
        {"adapter": {"rows": 64, "target_modules": ["mlp"]}, "router": {"balance": "bias"}}
    )
    assert config.peft_type == "MEFT" and peft.PeftType("MEFT") is peft.PeftType.MEFT
    assert copy.deepcopy(config) == config and MeftConfig(target_modules="mlp").target_modules == ["mlp"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rowz": 3}, 'no field adapter.rowz .* did you mean "rows"'),
        ({"top_k": 0}, "adapter.top_k = 0 is not valid"),
        ({"rows": 10, "num_experts": 3}, "adapter.rows = 10 is not divisible"),
        ({"router": {"balance": "no"}}, "router.balance = 'no'"),
        ({"compute_dtype": "fp16"}, "compute_dtype = 'fp16' is not valid; use bf16 or fp32"),
    ],
)
def test_a_bad_setting_is_refused_in_the_words_of_the_block(settings, sentence):
    with pytest.raises(MeftConfigError, match=sentence):
        MeftConfig(**settings)


def test_get_peft_model_builds_what_attach_builds(tmp_path, capsys):
    model = tiny_llama()
    base = logits(model)
    model = peft.get_peft_model(model, MeftConfig(**SHAPE, layers_to_transform=[0, 2], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), base), "values start at zero"
    built, other = model.base_model.attached["default"], tiny_llama()
    attached = attach(
        other, tiny_config({"layers_to_transform": [0, 2], "center_inputs": True}), compute_dtype=torch.float32
    )
    assert list(built.adapters) == list(attached.adapters)
    for one, two in zip(built.tables(), attached.tables(), strict=True):
        assert torch.equal(one.master, two.master)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"base_model.model.model.layers.{i}.mlp.meft_adapter.router" for i in (0, 2)]
    model.print_trainable_parameters()
    assert "trainable params: 320" in capsys.readouterr().out
    fill_values(built)
    model.save_pretrained(tmp_path)
    assert torch.equal(expected_from(tmp_path), logits(model.eval()))
    with pytest.raises(MeftConfigError, match="is being trained; load others into a fresh model"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def expected_from(folder: Path) -> Tensor:
    return logits(meft_engine.load_adapter(tiny_llama().eval(), folder))


def test_one_that_peft_built_learns_without_the_engine():
    """Routers by any optimizer of torch, rows by `SparseCPUAdam`; the base is frozen."""
    model = peft.get_peft_model(tiny_llama(), MeftConfig(**SHAPE)).train()
    attached = model.base_model.attached["default"]
    routers = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = SparseCPUAdam(attached.tables(), lr=3e-2)
    ids, losses = token_ids(4, 10), []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in (routers, rows):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_other_methods_go_on_as_they_were(tmp_path):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged.eval()), logits(model), rtol=1e-4, atol=1e-4)


# Importing


def test_peft_learns_of_it_when_it_is_imported_after_meft_engine():
    """Through a submodule, and after others have asked whether there is a PEFT."""
    code = "import sys, meft_engine, importlib.util as u; assert u.find_spec('peft') and u.find_spec('peft')\n"
    code += "assert not {'peft', 'torch', 'transformers'} & set(sys.modules)\n"
    code += "from peft.config import PeftConfig; import peft; assert 'meft_engine.peft' in sys.modules\n"
    code += "print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['MEFT'].__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "meft_engine.peft", done.stderr[-3000:]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for PEFT and for what is to follow it; what has been imported notes its name in ``order``."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "__init__.py").write_text("import after_import_order as o; o.order.append(__name__)")
    (tmp_path / "big" / "part.py").write_text("import after_import_order as o; o.order.append(__name__)")
    (tmp_path / "follower.py").write_text("import big, after_import_order as o; o.order.append(__name__)")
    (tmp_path / "broken.py").write_text("raise RuntimeError('of another version')")
    (tmp_path / "after_import_order.py").write_text("order = []")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield lambda: importlib.import_module("after_import_order").order
    for name in ("big", "big.part", "follower", "broken", "after_import_order"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("first", ["big", "big.part", "follower"])
def test_the_follower_is_imported_once_at_the_end_of_the_package(first, packages):
    finders = len(sys.meta_path)
    for _ in range(2):
        after_import.run("big", "follower")
    assert len(sys.meta_path) == finders + 1 and packages() == []
    assert importlib.util.find_spec("big") and importlib.util.find_spec("big"), "asking is not importing"
    assert packages() == []
    importlib.import_module(first)
    assert packages() == ["big", "follower", *(["big.part"] if first == "big.part" else [])]
    assert len(sys.meta_path) == finders and importlib.import_module("big").__spec__.loader is not None


def test_the_follower_is_imported_now_where_the_package_is_there(packages):
    importlib.import_module("big")
    after_import.run("big", "follower")
    assert packages() == ["big", "follower"]


def test_a_follower_that_fails_is_no_obstacle_to_the_package(packages):
    after_import.run("big", "broken")
    with pytest.warns(UserWarning, match="broken cannot be used with this version of big: .*of another version"):
        importlib.import_module("big")
    assert packages() == ["big"]


def test_a_package_that_is_not_there_is_still_not_there(packages):
    after_import.run("nowhere", "follower")
    assert importlib.util.find_spec("nowhere") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"):
        importlib.import_module("nowhere")
