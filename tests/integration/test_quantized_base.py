"""A base of four bits: keys start from its dequantised FFNs, it stays as it is, and an unmodified Trainer takes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import meft_engine
from meft_engine import MeftConfigError
from meft_engine.config import MeftConfig
from tests.families import fill_values, keys_from, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, masters, train_step

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""A block of bitsandbytes is 64 weights."""
BLOCK = tiny_block({"init_keys": "ffn", "rows": 160})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny Llama on disk."""
    place = tmp_path_factory.mktemp("llama")
    tiny_llama(**WIDE).save_pretrained(place)
    return place


def four_bit(folder: Path) -> LlamaForCausalLM:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings), device_map={"": "cpu"}
    ).train()


def dequantised(projection: nn.Module) -> torch.Tensor:
    return bitsandbytes.functional.dequantize_4bit(projection.weight.data, projection.weight.quant_state)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rows_train_over_four_bits(stage, folder):
    model = four_bit(folder)
    gates = [dequantised(layer.mlp.gate_proj).clone() for layer in model.model.layers]
    engine = build_engine(model, BLOCK, stage=stage, clip=0.5)
    start = masters(engine)
    for index, gate in enumerate(gates):
        assert torch.equal(
            start[f"model.layers.{index}.mlp/keys"], keys_from(gate, MeftConfig.from_block(BLOCK), index)
        )
    losses = [train_step(engine, [batch(step % 2)]) for step in range(8)]
    assert losses[-2] < losses[0] - 0.5
    assert set(differing(start, masters(engine))) == set(start)
    if stage < 3:
        assert all(torch.equal(dequantised(x.mlp.gate_proj), y) for x, y in zip(model.model.layers, gates, strict=True))


def test_the_adapter_loads_onto_four_bits_and_onto_sixteen_but_on_no_other_base(folder, tmp_path):
    engine = build_engine(four_bit(folder), BLOCK, stage=2)
    fill_values(engine.meft_adapters)
    train_step(engine, [batch(1)])
    engine.eval()
    engine.save_adapter(tmp_path)
    with torch.no_grad():
        expected = engine(input_ids=batch(2)).logits
        model = meft_engine.load_adapter(four_bit(folder).eval(), tmp_path)
        torch.testing.assert_close(model(input_ids=batch(2)).logits, expected, rtol=0, atol=1e-5)
    meft_engine.load_adapter(LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tmp_path)
    with pytest.raises(MeftConfigError, match="another base model"):
        meft_engine.load_adapter(tiny_llama(seed=1, **WIDE), tmp_path)


def trainer(model: nn.Module, block: dict[str, Any], folder: Path) -> Trainer:
    file = folder / "ds_config.json"
    open_values = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    file.write_text(json.dumps({**open_values, "zero_optimization": {"stage": 2}, "meft": block}))
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=str(file),
        per_device_train_batch_size=4,
        max_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-2,
        max_grad_norm=0.5,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in batch(1, size=8)]
    return Trainer(model=model, args=arguments, train_dataset=data)


@pytest.fixture
def enabled():
    """MEFT is on for one test; accelerate, which keeps a configuration for the whole process, forgets it after."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    meft_engine.enable()
    yield
    meft_engine.disable()
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def test_an_unmodified_trainer_trains_over_four_bits(folder, tmp_path, enabled):
    run = trainer(four_bit(folder), BLOCK, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert type(run.model_wrapped).__name__ == "MeftEngine" and losses[-1] < losses[0] - 0.2
    run.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not list(tmp_path.glob("model*.safetensors"))


def test_a_trainer_refuses_four_bits_where_nothing_would_train(folder, tmp_path, enabled):
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(four_bit(folder), {"enabled": False}, tmp_path)


def test_disable_brings_transformers_check_back():
    places = (sys.modules["transformers.trainer_utils"], sys.modules["transformers.trainer"])
    before = [place.validate_quantization_for_training for place in places]
    meft_engine.enable()
    meft_engine.enable()
    assert all(place.validate_quantization_for_training is not before[0] for place in places)
    meft_engine.disable()
    assert [place.validate_quantization_for_training for place in places] == before
    assert transformers.trainer.validate_quantization_for_training.__module__ == "transformers.trainer_utils"
