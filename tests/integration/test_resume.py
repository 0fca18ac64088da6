"""Resuming is exact: run(20) is run(10), save, a new engine, load and run(10), to the last bit."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from meft_engine.checkpoint import folders, shards
from meft_engine.checkpoint.snapshot import RowSnapshot
from meft_kernels.planes import join
from tests.families import VOCAB, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    lm_loss,
    row_gradients,
    tables,
    train_step,
)

GAS, STEPS = 2, 10
ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
WARM_UP = {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-2, "warmup_num_steps": 6, "total_num_steps": 24}


def decay(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


def make_engine(stage: int, bf16: bool, client_schedule: bool, **overrides: Any) -> Any:
    # Dropout draws from PyTorch's generator in every forward.
    model = tiny_llama(attention_dropout=0.2)
    schedule = {"type": "WarmupDecayLR", "params": WARM_UP}
    settings = {"lr_scheduler": decay} if client_schedule else {"scheduler": schedule}
    return build_engine(model, stage=stage, bf16=bf16, gas=GAS, clip=0.5, adam=ADAM, **settings, **overrides)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # One normal deviate each, so that the generators hold a cached second one.
    random.gauss(0, 1)
    np.random.standard_normal()


def draw_batch() -> torch.Tensor:
    """A batch that depends on all three generators."""
    shift = random.randrange(VOCAB) + int(np.random.randint(VOCAB)) + int(10 * random.gauss(0, 1))
    shift += int(10 * np.random.standard_normal())
    return 3 + (torch.randint(VOCAB, (4, 8)) + shift) % (VOCAB - 3)


def run(engine: Any, steps: int) -> list[tuple]:
    """Train on drawn batches; for every step the loss, the norm and the rate."""
    curve = []
    for _ in range(steps):
        loss = train_step(engine, [draw_batch() for _ in range(GAS)])
        curve.append((loss, float(engine.get_global_grad_norm()), *engine.get_lr()))
    return curve


@pytest.mark.parametrize("client_schedule", [False, True])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, False), (2, True), (0, True)])
def test_resuming_is_exact(stage, bf16, client_schedule, tmp_path):
    through = make_engine(stage, bf16, client_schedule)
    seed_everything(1)
    whole = run(through, 2 * STEPS)
    drawn_after = torch.rand(3), np.random.rand(3), random.random()

    first = make_engine(stage, bf16, client_schedule)
    seed_everything(1)
    assert run(first, STEPS) == whole[:STEPS], "two equal runs must be equal, or resuming cannot be tested"
    first.save_checkpoint(str(tmp_path), client_state={"epoch": 3})
    at_save = full_state(first)
    train_step(first, [batch(1), batch(2)])

    second = make_engine(stage, bf16, client_schedule)
    train_step(second, [batch(3), batch(4)])
    seed_everything(99)
    _, client_state = second.load_checkpoint(str(tmp_path))
    assert client_state["epoch"] == 3
    assert differing(full_state(second), at_save) == []
    assert second.global_steps == STEPS

    assert run(second, STEPS) == whole[STEPS:]
    assert differing(full_state(second), full_state(through)) == []
    assert second.lr_scheduler.state_dict() == through.lr_scheduler.state_dict()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], drawn_after[0]) and (drawn[1] == drawn_after[1]).all() and drawn[2] == drawn_after[2]
    moved = [name for name in at_save if not torch.equal(at_save[name], full_state(through)[name])]
    assert len(moved) > len(at_save) / 2, "the second half must train, or equality would say nothing"


# Every pair of a stage, a mode, overlap on or off, and a save at once or in the background.
PAIRS = [
    (0, "lazy", True, True),
    (0, "dense_equivalent", False, False),
    (1, "dense_equivalent", True, False),
    (1, "lazy", False, True),
    (2, "lazy", True, False),
    (2, "dense_equivalent", False, True),
    (3, "dense_equivalent", True, True),
    (3, "lazy", False, False),
]


@pytest.mark.parametrize(("stage", "mode", "overlap", "background"), PAIRS)
def test_training_goes_on_from_the_moment_of_the_save(stage, mode, overlap, background, tmp_path, monkeypatch):
    """Rows are written while later steps change them; a new engine goes on from where they were."""
    take = RowSnapshot.take

    def take_slowly(snapshot: RowSnapshot, block: Any) -> Any:
        time.sleep(0.05)
        return take(snapshot, block)

    block = tiny_block(
        {"center_inputs": True},
        optimizer={"mode": mode, "overlap": overlap, "value_lr_scale": 2.0},
        checkpoint={"async_save": background},
    )
    engine = make_engine(stage, stage == 2, False, meft=block)
    seed_everything(1)
    run(engine, 3)
    with monkeypatch.context() as patched:
        patched.setattr(RowSnapshot, "take", take_slowly if background else take)
        engine.save_checkpoint(str(tmp_path))
        at_save = full_state(engine)
        assert background == (not (tmp_path / "latest").exists()), "the save must be on its way while training goes on"
        after = run(engine, 3)
        engine._saver.finish()
    expected = full_state(engine)

    other = make_engine(stage, stage == 2, False, meft=block)
    seed_everything(99)
    other.load_checkpoint(str(tmp_path))
    assert differing(full_state(other), at_save) == []
    assert run(other, 3) == after
    assert differing(full_state(other), expected) == []
    assert len(differing(at_save, expected)) > len(expected) / 2


def test_the_next_save_waits_for_the_last(tmp_path, monkeypatch):
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"async_save": True}))
    write, order = shards.write_rows, []

    def write_slowly(*arguments: Any) -> Any:
        order.append("begin")
        time.sleep(0.3)
        order.append("end")
        return write(*arguments)

    monkeypatch.setattr(shards, "write_rows", write_slowly)
    for step in range(3):
        train_step(engine, [batch(step)])
        engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    assert order == ["begin", "end"] * 3
    assert [folder.name for folder in folders.whole_ones(tmp_path)] == [f"global_step{n}" for n in (1, 2, 3)]


def test_skipped_steps_are_part_of_the_state(tmp_path):
    engine = make_engine(2, True, False)
    run(engine, 2)
    for micro in range(GAS):
        loss = lm_loss(engine, batch(micro))
        engine.backward(loss * (torch.inf if micro else 1.0))
        engine.step()
    engine.save_checkpoint(str(tmp_path), tag="after-a-skip")
    other = make_engine(2, True, False)
    other.load_checkpoint(str(tmp_path), tag="after-a-skip")
    assert (other.global_steps, other.skipped_steps) == (3, 1)
    assert other.get_lr() == engine.get_lr()
    assert differing(full_state(other), full_state(engine)) == []


@pytest.mark.parametrize("stage", [0, 2])
def test_loading_goes_back_in_the_same_engine(stage, tmp_path):
    engine = make_engine(stage, False, False)
    seed_everything(1)
    run(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    first = run(engine, 3)
    after = full_state(engine)
    engine.load_checkpoint(str(tmp_path))
    assert run(engine, 3) == first
    assert differing(full_state(engine), after) == []


def test_saving_inside_a_window_names_the_micro_step(tmp_path):
    engine = make_engine(0, False, False)
    run(engine, 1)
    engine.backward(lm_loss(engine, batch(1)))
    engine.step()
    pending = row_gradients(engine)
    with pytest.raises(RuntimeError, match=r"micro-step 1 of 2.*save after the step that ends the window"):
        engine.save_checkpoint(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    # The window goes on, and at its end saving works.
    assert all(torch.equal(grad, pending[name][1]) for name, (_, grad) in row_gradients(engine).items())
    engine.backward(lm_loss(engine, batch(2)))
    with pytest.raises(RuntimeError, match="micro-step 2 of 2"):
        engine.save_checkpoint(str(tmp_path))
    engine.step()
    engine.save_checkpoint(str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step2"


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, True)])
def test_what_a_checkpoint_holds(stage, bf16, tmp_path):
    """Safetensors alone beside DeepSpeed's files, exact fp32 rows, and the frozen base only when it is asked for."""
    held = {}
    for save_base in (False, True):
        folder = tmp_path / str(save_base)
        block = tiny_block(checkpoint={"save_base": save_base})
        engine = build_engine(tiny_llama(), block, stage=stage, bf16=bf16, adam=ADAM)
        train_step(engine, [batch(1)])
        engine.save_checkpoint(str(folder), tag="t")
        ours = sorted(path.name for path in (folder / "t" / "meft").iterdir())
        assert ours == [
            "adapter_config.json",
            "manifest.json",
            "rows-0-of-1.safetensors",
            "shared.safetensors",
        ]
        assert sorted(path.name for path in (folder / "t").iterdir() if path.is_dir()) == ["meft"]
        states = folder / "t" / "mp_rank_00_model_states.pt"
        held[save_base] = set(torch.load(states, weights_only=True)["module"])
    # Of tied weights neither name is written.
    assert held[False] == {f"{name}.meft_adapter.router" for name in engine.meft_adapters.adapters}
    assert held[True] == held[False] | set(tiny_llama().state_dict())
    check_saved_rows(engine, folder / "t" / "meft")


def check_saved_rows(engine: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / "rows-0-of-1.safetensors")
    for name, table in tables(engine).items():
        rows = saved[f"{name}/compute/0-35"]
        if rows.dtype == torch.bfloat16:
            rows = join(rows, saved[f"{name}/low/0-35"])
        assert torch.equal(rows, table.master)
        for kind, value in engine.row_optimizer.state[table.handle].items():
            assert torch.equal(saved[f"{name}/{kind}/0-35"], value)


def test_a_saved_base_is_restored(tmp_path):
    """`save_base` makes a checkpoint independent of where the base comes from."""
    block = tiny_block(checkpoint={"save_base": True})
    engine = build_engine(tiny_llama(), block)
    with torch.no_grad():
        engine.module.model.norm.weight.mul_(1.5)
    engine.save_checkpoint(str(tmp_path))
    other = build_engine(tiny_llama(), block)
    other.load_checkpoint(str(tmp_path))
    assert torch.equal(other.module.model.norm.weight, engine.module.model.norm.weight)
