"""What is planned for a device is what training takes there, and the case of 24 GB adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meft_engine.config import MeftConfig
from meft_engine.planner import ModelShape, base_bytes_needed, device_bytes_needed
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, train_step
from tests.integration.kept import kept_by_autograd
from tests.late_copies import use_late_device

CONFIGS = Path(__file__).parents[2] / "ds_configs"
GB = 10**9
LLAMA_2_7B = ModelShape(layers=32, width=4096, intermediate=11008, vocabulary=32000, parameters=6_738_415_616)


@pytest.mark.parametrize(
    ("sections", "bf16"),
    [
        ({}, True),
        ({"active_rows": {"cap": 9}}, False),
        ({"offload": {"slot_bytes": 0}}, True),
        ({"offload": {"slot_bytes": 5000, "grad_slot_bytes": 10_000}}, False),
        ({"offload": {"keys": "host", "slot_bytes": 20_000}}, False),
        ({"offload": {"keys_dtype": "int8"}}, True),
        ({"offload": {"resident_bytes": 50_000}}, False),
        ({"offload": {"resident_bytes": 10**9}, "optimizer": {"moments_dtype": "bf16"}}, True),
    ],
    ids=str,
)
def test_the_account_is_the_plan(sections, bf16, monkeypatch):
    """By kind, to the byte, once a window has been trained."""
    use_late_device(monkeypatch.setattr)
    engine = build_engine(tiny_llama(num_hidden_layers=4), tiny_block(**sections), gas=2, bf16=bf16)
    batches = [batch(i) for i in range(2)]
    train_step(engine, batches)
    dtype, tokens = torch.bfloat16 if bf16 else torch.float32, batches[0].numel()
    planned = device_bytes_needed(engine.meft_config, 4, 32, tokens, compute_dtype=dtype)
    report = engine.meft_report()
    assert report["device_bytes_by_kind"] == planned
    assert report["device_bytes"] == sum(planned.values())
    assert report["traffic"]["misses"] > 0
    engine.destroy()


@pytest.mark.parametrize("stage_3", [False, True])
def test_activations_of_a_frozen_base(stage_3, monkeypatch):
    """What autograd keeps of a model of this shape, by its own account: within a twentieth."""
    given = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **given)).bfloat16()
    ids = torch.randint(1000, (2, 96))
    kept = sum(kept_by_autograd(model, ids, stage_3, monkeypatch).values())
    found = base_bytes_needed(
        ModelShape(4, 128, 344, 1000, sum(p.numel() for p in model.parameters())), ids.numel(), keeps_inputs=stage_3
    )
    assert found["base"] == sum(p.nbytes for p in model.parameters())
    # Beside the logits autograd keeps their softmax in fp32, and knows nothing of themselves in fp32 and of their
    # gradient. There is no adapter here that keeps its inputs, which stage 3 keeps anyway.
    unseen = ids.numel() * ((0 if stage_3 else 4 * 2 * 128) + (4 + 2) * 1000)
    assert kept == pytest.approx(found["activations"] - unseen, rel=0.05)


@pytest.mark.parametrize(
    "block",
    [
        json.loads((CONFIGS / "meft_24gb.json").read_text())["meft"],
        {"adapter": {"rows": 16384}, "active_rows": {"cap": 8192}, "offload": {"slot_bytes": 10**9}},
        {"adapter": {"rows": 16384}, "offload": {"slot_bytes": 0, "grad_slot_bytes": 10**9}},
        {"adapter": {"rows": 16384}, "offload": {"keys_dtype": "int8", "slot_bytes": 3 * 10**9}},
    ],
    ids=["meft_24gb.json", "8192 active rows", "no slots to keep", "int8"],
)
def test_the_case_of_24_gb_fits(block):
    """A 7B model of the Llama family, 2 × 256 tokens a micro-step, in the last three 4.3 B adapter parameters."""
    config = MeftConfig.from_block(block)
    adapters = device_bytes_needed(config, 32, 4096, 512, compute_dtype=torch.bfloat16)
    base = base_bytes_needed(LLAMA_2_7B, 512)
    assert 13 * GB < base["base"] < 14 * GB and adapters["keys"] > 2 * GB
    assert sum(adapters.values()) + sum(base.values()) < 23.5 * GB
