"""Every stage of ZeRO, with every offload to the CPU, trains the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import meft_engine
from tests.families import FAMILIES, fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    ds_config,
    full_state,
    largest_difference,
    lm_loss,
    masters,
    router_values,
    routers,
    train_step,
)

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
STAGES = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1, optimizer offloaded": {"stage": 1, "offload": True},
    "2": {"stage": 2},
    "2, optimizer offloaded": {"stage": 2, "offload": True},
    "3": {"stage": 3},
    "3, optimizer offloaded": {"stage": 3, "offload": True},
    "3, parameters offloaded": {"stage": 3, "offload_param": True},
    "3, both offloaded": {"stage": 3, "offload": True, "offload_param": True},
}


def make_engine(model: nn.Module | None = None, **settings: Any) -> Any:
    engine = build_engine(model or tiny_llama(), adam=ADAM, **settings)
    fill_values(engine.meft_adapters)
    return engine


def five_steps(engine: Any, gas: int) -> tuple[list[float], list[float], dict, dict]:
    """Losses, joint norms, rows and routers."""
    losses, norms = [], []
    for step in range(5):
        losses.append(train_step(engine, batch(200 + step % 2, size=8, length=10).chunk(gas)))
        norms.append(float(engine.get_global_grad_norm()))
    found = losses, norms, masters(engine), router_values(engine)
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def at_stage_0() -> dict[tuple[bool, str], tuple]:
    """What five steps give there, by precision and gate."""
    return {
        (bf16, gate): five_steps(make_engine(meft=tiny_block({"gate": gate}), stage=0, bf16=bf16, gas=2, clip=0.4), 2)
        for bf16 in (False, True)
        for gate in ("softmax", "none")
    }


@pytest.mark.parametrize("gate", ["softmax", "none"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [name for name in STAGES if name != "0"])
def test_stages_and_offloads_agree(name, bf16, gate, at_stage_0):
    """With the gate "none" DeepSpeed has nothing to train but an anchor."""
    settings = {"meft": tiny_block({"gate": gate}), "bf16": bf16, "gas": 2, "clip": 0.4}
    losses, norms, rows, final_routers = at_stage_0[bf16, gate]
    assert losses[-1] < losses[0] - 0.1 and max(norms) > 0.4
    other_losses, other_norms, other_rows, other_routers = five_steps(make_engine(**settings, **STAGES[name]), 2)
    assert other_losses == pytest.approx(losses, abs=1e-4)
    assert other_norms == pytest.approx(norms, abs=1e-4)
    assert largest_difference(rows, other_rows) < 1e-4
    assert largest_difference(final_routers, other_routers) < 1e-4


# --- models that are partitioned from the beginning


def born_partitioned(source: nn.Module, config: dict[str, Any], folder: Path) -> nn.Module:
    """The same model, loaded as a Trainer's script loads it under stage 3: each weight is partitioned as it is read."""
    source.save_pretrained(folder)
    transformers_knows = HfDeepSpeedConfig(config)
    try:
        model = type(source).from_pretrained(folder, dtype=source.dtype)
    finally:
        del transformers_knows
        unset_hf_deepspeed_config()
    assert all(parameter.numel() == 0 and hasattr(parameter, "ds_id") for parameter in model.parameters())
    return model.train()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["3", "3, both offloaded"])
def test_a_model_built_under_zero_init_trains_as_any_other(name, bf16, tmp_path):
    settings = {"bf16": bf16, "clip": 0.5, **STAGES[name]}
    # Keys from the FFN have to be read from its partitions; bf16 weights are rounded as they are partitioned.
    block = tiny_block({"init_keys": "ffn", "rows": 60})
    source = tiny_llama().to(torch.bfloat16 if bf16 else torch.float32)
    model = born_partitioned(source, ds_config(None, **settings), tmp_path)
    whole = make_engine(LlamaForCausalLM.from_pretrained(tmp_path, dtype=source.dtype), meft=block, **settings)
    start = masters(whole)
    engine = make_engine(model, meft=block, **settings)
    assert differing(start, masters(engine)) == []
    assert engine.meft_report()["base_parameters"] == sum(p.numel() for p in source.parameters())
    # Three layers of 60 keys and values and 5 experts, each 32 wide.
    assert engine.meft_report()["adapter_parameters"] == 3 * 32 * (2 * 60 + 5)
    one, other = five_steps(whole, 1), five_steps(engine, 1)
    assert one[0] == pytest.approx(other[0], abs=1e-4)
    assert largest_difference(one[2], other[2]) < 1e-4


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "Phi-3", "Qwen2-MoE", "Mixtral", "T5"])
def test_partitioned_ffns_of_other_families_are_found(family, tmp_path):
    model = born_partitioned(FAMILIES[family].model(), ds_config(None, stage=3), tmp_path)
    block = tiny_block({"init_keys": "ffn", "rows": 60})
    engine = build_engine(model, block, stage=3, adam=ADAM)
    whole = build_engine(FAMILIES[family].model(), block, stage=3, adam=ADAM)
    assert list(engine.meft_adapters.adapters) == list(whole.meft_adapters.adapters)
    assert differing(masters(engine), masters(whole)) == []
    assert differing(router_values(engine), router_values(whole)) == []


# --- what a partitioned router has to go through


def test_stage_3_resumes_exactly(tmp_path):
    engine, resumed = make_engine(stage=3, clip=0.5), make_engine(stage=3, clip=0.5)
    for seed in range(3):
        train_step(engine, [batch(seed)])
    engine.save_checkpoint(str(tmp_path))
    resumed.load_checkpoint(str(tmp_path))
    assert differing(full_state(engine), full_state(resumed)) == []
    for seed in range(3, 6):
        assert train_step(engine, [batch(seed)]) == train_step(resumed, [batch(seed)])
    assert differing(full_state(engine), full_state(resumed)) == []


def test_stage_3_loads_an_adapter_without_its_optimizer(tmp_path):
    engine, other = make_engine(stage=3), make_engine(stage=3)
    for seed in range(3):
        train_step(engine, [batch(seed)])
    engine.save_checkpoint(str(tmp_path))
    other.load_checkpoint(str(tmp_path), load_optimizer_states=False)
    assert differing(masters(engine), masters(other)) == []
    trained = router_values(engine)
    assert differing(trained, router_values(other)) == []
    # The optimizer steps from the loaded routers, not from those that it began with.
    train_step(other, [batch(9)])
    assert 0 < largest_difference(trained, router_values(other)) < 0.05


@pytest.mark.parametrize("name", ["3", "3, both offloaded"])
def test_stage_3_saves_an_adapter_that_loads_into_a_plain_model(name, tmp_path):
    engine = make_engine(**STAGES[name])
    train_step(engine, [batch(1)])
    engine.eval()
    engine.save_adapter(tmp_path)
    model = meft_engine.load_adapter(tiny_llama().eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(model, batch(2)), lm_loss(engine, batch(2)), rtol=0, atol=1e-5)
    saved = {name: adapter.router for name, adapter in _adapters(model).items()}
    assert differing(saved, router_values(engine)) == []


def _adapters(model: LlamaForCausalLM) -> dict[str, Any]:
    return {f"model.layers.{i}.mlp": layer.mlp.meft_adapter for i, layer in enumerate(model.model.layers)}


def test_routers_of_stage_3_really_are_partitioned():
    engine = make_engine(stage=3)
    train_step(engine, [batch(1)])
    assert all(router.numel() == 0 for router in routers(engine).values())
    assert "experts=5" in repr(engine.module)
