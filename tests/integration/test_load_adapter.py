"""`load_adapter` gives a plain transformers model the engine's logits, where DeepSpeed cannot even be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import meft_engine
from tests.families import fill_values, tiny_block, tiny_llama, token_ids
from tests.integration.engines import batch, build_engine, train_step

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
NEW_TOKENS = 8

SCRIPT = """
import json, sys
sys.modules["deepspeed"] = None
sys.modules["triton"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import meft_engine

results = {}
for name, job in json.load(open(sys.argv[1])).items():
    inputs = torch.load(job["inputs"], weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    assert meft_engine.load_adapter(model, job["folder"]) is model
    with torch.no_grad():
        logits = model(input_ids=inputs["ids"], attention_mask=inputs["mask"]).logits
    generated = model.generate(
        input_ids=inputs["ids"], attention_mask=inputs["mask"], max_new_tokens=job["new_tokens"], do_sample=False
    )
    results[name] = {"logits": logits, "generated": generated[:, inputs["ids"].shape[1] :]}
try:
    import deepspeed
except ImportError:
    results["deepspeed"] = False
torch.save(results, sys.argv[2])
"""

KINDS = {
    "fp32": {"stage": 0},
    "bf16": {"stage": 2, "bf16": True},
    "bf16 model, fp32 rows": {"stage": 2, "bf16": True, "compute_dtype": "fp32"},
    "gate none, two layers": {"stage": 2, "adapter": {"gate": "none", "layers_to_transform": "1-2"}},
}


def padded_prompts() -> dict[str, torch.Tensor]:
    """Four prompts of different lengths, padded on the left."""
    ids, mask = token_ids(4, 9, seed=3), torch.ones(4, 9, dtype=torch.int64)
    for row, padding in enumerate((0, 2, 5, 7)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"ids": ids, "mask": mask}


def trained_engine(
    stage: int, bf16: bool = False, compute_dtype: str | None = None, adapter: dict | None = None
) -> Any:
    block = tiny_block(adapter, offload={"compute_dtype": compute_dtype})
    engine = build_engine(tiny_llama(), block, stage=stage, bf16=bf16, adam=ADAM)
    fill_values(engine.meft_adapters)
    for step in range(3):
        train_step(engine, [batch(step)])
    engine.eval()
    return engine


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    return {kind: trained_engine(**settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(engines, tmp_path_factory) -> dict[str, Any]:
    """What the process without DeepSpeed made of every saved adapter; one process for all."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.save(padded_prompts(), folder / "inputs.pt")
    tiny_llama().save_pretrained(folder / "base")
    jobs = {}
    for index, (kind, engine) in enumerate(engines.items()):
        engine.save_adapter(folder / f"{index}")
        engine.save_checkpoint(str(folder / f"{index}-checkpoint"))
        common = {"inputs": str(folder / "inputs.pt"), "base": str(folder / "base"), "new_tokens": NEW_TOKENS}
        common["dtype"] = "bfloat16" if KINDS[kind].get("bf16") else "float32"
        for source in ("adapter", "checkpoint"):
            place = folder / f"{index}{'-checkpoint' if source == 'checkpoint' else ''}"
            jobs[f"{kind}/{source}"] = {**common, "folder": str(place)}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        str(folder / "script.py"),
        str(folder / "jobs.json"),
        str(folder / "results.pt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("source", ["adapter", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_engines(kind, source, engines, loaded):
    assert loaded["deepspeed"] is False, "DeepSpeed must not have been importable there"
    prompts = padded_prompts()
    with torch.no_grad():
        expected = engines[kind](input_ids=prompts["ids"], attention_mask=prompts["mask"]).logits
        base = tiny_llama().eval()(input_ids=prompts["ids"], attention_mask=prompts["mask"]).logits
    assert expected.dtype == (torch.bfloat16 if KINDS[kind].get("bf16") else torch.float32)
    assert (expected - base).abs().max() > 0.3, "the adapter must change the logits for this to test anything"
    assert torch.equal(loaded[f"{kind}/{source}"]["logits"], expected)


@pytest.mark.parametrize("kind", ["fp32", "gate none, two layers"])
def test_greedy_generation_with_left_padding(kind, engines, loaded):
    """Each prompt goes on as it does alone and unpadded, by the engine's logits over the whole text so far."""
    prompts = padded_prompts()
    generated = loaded[f"{kind}/adapter"]["generated"]
    assert torch.equal(generated, loaded[f"{kind}/checkpoint"]["generated"])
    differs_from_base = False
    for row in range(4):
        text = prompts["ids"][row][prompts["mask"][row].bool()][None]
        for token in generated[row].tolist():
            with torch.no_grad():
                logits = engines[kind](input_ids=text, use_cache=False).logits[0, -1]
                base = tiny_llama().eval()(input_ids=text, use_cache=False).logits[0, -1]
            best = logits.topk(2)
            assert token == int(best.indices[0]) or best.values[0] - logits[token] < 1e-5
            differs_from_base |= token != int(base.argmax())
            text = torch.cat((text, torch.tensor([[token]])), dim=1)
            if token == 2:  # the end of the text, after which only padding comes
                break
    assert differs_from_base


def test_the_saved_adapter_is_in_the_compute_precision(engines, tmp_path):
    """The travelling file is half the size in bf16; the checkpoint keeps fp32 masters."""
    from safetensors.torch import load_file

    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        engines[kind].save_adapter(tmp_path / kind)
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        saved = load_file(tmp_path / kind / "adapter_model.safetensors")
        rows = {tensor.dtype for name, tensor in saved.items() if name.endswith((".keys", ".values"))}
        assert rows == {dtype}
    described = json.loads((tmp_path / "bf16" / "adapter_config.json").read_text())
    assert described["meft"]["adapter"]["rows"] == 35 and described["compute_dtype"] == "bf16"


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("bf16", [False, True])
def test_idle_rows_of_a_checkpoint_catch_up_when_it_is_loaded(bf16, moments, tmp_path):
    """In the mode "dense_equivalent" a checkpoint holds rows as stored, an exported adapter rows brought to date."""
    block = tiny_block(
        {"rows": 500}, optimizer={"mode": "dense_equivalent", "moments_dtype": moments, "value_lr_scale": 3.0}
    )
    engine = build_engine(tiny_llama(), block, stage=2, bf16=bf16, adam=ADAM)
    fill_values(engine.meft_adapters)
    for step in range(6):
        train_step(engine, [batch(step, size=1, length=3)])
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    engine.save_adapter(tmp_path / "exported")
    loaded = []
    for folder in ("checkpoint", "exported"):
        model = tiny_llama()
        meft_engine.load_adapter(model, tmp_path / folder)
        loaded.append([m.meft_adapter for m in model.modules() if hasattr(m, "meft_adapter")])
    behind = 0
    for mine, resumed, exported in zip(engine.meft_adapters.adapters.values(), *loaded, strict=True):
        for kind in ("keys", "values"):
            found, expected = (getattr(adapter, kind).planes()[0] for adapter in (resumed, exported))
            assert torch.equal(found, expected)
            behind += int((getattr(mine, kind).planes()[0] != expected).any(1).sum())
        # What the engine computes with is what the exported adapter has.
        rows = torch.arange(500)
        assert torch.equal(mine.values.gather(rows), exported.values.gather(rows))
    assert behind > 50, "rows must have been idle, or nothing is tested"
