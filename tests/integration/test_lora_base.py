"""A base that carries a PEFT LoRA: both train, share one norm, and are saved so that each can be loaded alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

import meft_engine
from tests.families import FAMILIES, fill_values, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, lm_loss, masters, row_gradients, train_step
from tests.integration.oracles import global_norm

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def with_lora(model: nn.Module, targets: list[str] | str = "all-linear") -> nn.Module:
    """With LoRA matrices that matter: PEFT starts one of each pair from zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_engine(stage: int = 2, **settings: Any) -> Any:
    engine = build_engine(with_lora(tiny_llama()), adam=ADAM, stage=stage, **settings)
    fill_values(engine.meft_adapters)
    return engine


def lora_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_both_train_under_one_norm(stage):
    engine = make_engine(stage)
    # Read before anything trains, while all of it is whole.
    start = {name: p.clone() for name, p in with_lora(tiny_llama()).named_parameters()}
    rows = masters(engine)
    losses = []
    for step in range(8):
        loss = lm_loss(engine, batch(step % 2))
        engine.backward(loss)
        pending = [grad for _, grad in row_gradients(engine).values()]
        if stage:
            own = [safe_get_full_grad(p) for p in engine.module.parameters() if p.requires_grad]
        else:
            own = [p.grad for p in engine.module.parameters() if p.requires_grad]
        expected = global_norm([*pending, *own])
        engine.step()
        assert engine.get_global_grad_norm() == pytest.approx(expected, rel=1e-4)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert set(differing(rows, masters(engine))) == set(rows)
    state = engine.module.state_dict() if stage < 3 else engine._zero3_consolidated_16bit_state_dict()
    if stage == 3:
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        assert set(state) == trained, "the frozen base is not brought together"
    moved = {name for name in start if name in state and not torch.equal(state[name], start[name])}
    assert moved == {name for name in start if "lora_" in name}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_saved_loads_in_plain_peft_and_with_the_adapter(stage, given, tmp_path):
    engine = make_engine(stage)
    for step in range(3):
        train_step(engine, [batch(step)])
    engine.eval()
    ids = batch(9)
    with torch.no_grad():
        expected = engine(input_ids=ids).logits.clone()
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    engine.module.save_pretrained(tmp_path, **({"state_dict": state} if given else {}))
    assert all((tmp_path / folder / "adapter_model.safetensors").is_file() for folder in ("", "meft"))
    assert not list(tmp_path.glob("model*.safetensors"))

    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert not any("meft" in name for name, _ in plain.named_parameters())
    loaded = {name: p for name, p in plain.named_parameters() if "lora_" in name}
    assert differing(loaded, {name: value for name, value in state.items() if "lora_" in name}) == []
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-3)
        meft_engine.load_adapter(plain, tmp_path)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_an_adapter_fits_the_model_with_and_without_the_wrapper(tmp_path):
    engine = make_engine()
    train_step(engine, [batch(1)])
    engine.save_adapter(tmp_path)
    ids = batch(9)
    wrapped = meft_engine.load_adapter(with_lora(tiny_llama()).eval(), tmp_path)
    # A LoRA that is merged into the weights of attention alone leaves FFNs, and thus the adapter's base, as they were.
    merged = with_lora(tiny_llama(), ["q_proj"]).merge_and_unload().eval()
    other = meft_engine.load_adapter(with_lora(tiny_llama(), ["q_proj"]).eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            meft_engine.load_adapter(merged, tmp_path)(input_ids=ids).logits,
            other(input_ids=ids).logits,
            rtol=0,
            atol=1e-4,
        )
        assert not torch.allclose(wrapped(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-3)


def test_a_checkpoint_resumes_both(tmp_path):
    engine, resumed = make_engine(clip=0.5), make_engine(clip=0.5)
    for step in range(2):
        train_step(engine, [batch(step)])
    engine.save_checkpoint(str(tmp_path))
    resumed.load_checkpoint(str(tmp_path))
    for step in range(2, 4):
        assert train_step(engine, [batch(step)]) == train_step(resumed, [batch(step)])
    assert differing(masters(engine), masters(resumed)) == []
    assert differing(lora_of(engine), lora_of(resumed)) == []


def test_an_unfrozen_base_is_saved_with_the_adapter(tmp_path):
    """Nothing that was trained may be missing from what ``save_pretrained`` writes."""
    engine = build_engine(tiny_llama(), tiny_block({"freeze_base": False}), adam=ADAM, stage=2)
    fill_values(engine.meft_adapters)
    for step in range(2):
        train_step(engine, [batch(step)])
    engine.eval()
    with torch.no_grad():
        expected = engine(input_ids=batch(9)).logits.clone()
    engine.module.save_pretrained(tmp_path)
    base, report = type(tiny_llama()).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    model = meft_engine.load_adapter(base.eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch(9)).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.behaviour("with a LoRA")
def test_a_lora_trains_beside_the_adapter_in_every_family(family, tmp_path: Path):
    kind = FAMILIES[family]
    # Attention alone: experts that are stacked in one tensor are no layers to PEFT's "all-linear".
    names = {"q_proj", "query_key_value", "qkv_proj", "c_attn", "q"}
    found = {n.rpartition(".")[2] for n, _ in kind.model().named_modules()} & names
    lora = with_lora(kind.model(), sorted(found))
    engine = build_engine(lora, adam=ADAM, stage=2)
    fill_values(engine.meft_adapters)
    before, rows = lora_of(engine), masters(engine)
    ids = batch(1, length=6)
    losses = []
    for _ in range(4):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(differing(before, lora_of(engine))) == len(before) > 0
    assert set(differing(rows, masters(engine))) == set(rows)
    engine.module.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(kind.model(), tmp_path)
    assert differing(dict(_lora(plain)), lora_of(engine)) == []


def _lora(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]
