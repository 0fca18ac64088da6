"""What trains beside the rows goes on under any ZeRO stage, from what was captured under any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import meft_engine
from meft_engine.checkpoint import engine_state, parameter_state
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    differing,
    ds_config,
    largest_difference,
    row_state,
    train_step,
)
from tests.integration.test_lora_base import with_lora

STEPS = 3
"""Before the change, and after it."""

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}
SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "total_num_steps": 24}}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2, offloaded": {"stage": 2, "offload": True},
    "3, offloaded": {"stage": 3, "offload": True, "offload_param": True},
}
BF16 = {"bf16": True, "lora": False}
"""Without a LoRA, whose gradients in bf16 are not the same in all stages."""
FP32 = {"bf16": False, "lora": True}
ALL_STAGES = [(one, other) for one in "0123" for other in "0123"]


class Counting(nn.Module):
    """Something with a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self) -> None:
        if self.training:
            self.batches += 1
            self.passing += 1


def make_engine(
    name: str,
    *,
    lora: bool = True,
    adam: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    block: dict[str, Any] | None = None,
    optimizer: Any = None,
    **settings: Any,
) -> Any:
    """At a stage of :data:`STAGES`, with a schedule, one norm and a buffer.

    Args:
        lora: whether one trains beside the routers. zero: more of ``zero_optimization``. block: of the adapter.
        optimizer: makes the client's, of the model.
    """
    model = tiny_llama(num_hidden_layers=2)
    model.counting = Counting()
    model.register_forward_hook(lambda module, *_: module.counting())
    if lora:
        model = with_lora(model, ["q_proj", "v_proj"])
    settings = {**({} if optimizer else {"scheduler": SCHEDULE}), "clip": 0.5, **STAGES[name], **settings}
    config = ds_config(tiny_block(block), adam={} if optimizer else {**ADAM, **(adam or {})}, **settings)
    config.get("zero_optimization", {}).update(zero or {})
    client = optimizer(model) if optimizer else None
    engine = meft_engine.initialize(model=model, optimizer=client, config=config)[0]
    fill_values(engine.meft_adapters)
    return engine


def train(engine: Any, start: int = 0, steps: int = STEPS) -> list[float]:
    """The losses of some steps."""
    return [train_step(engine, [batch(100 + step, size=2, length=8)]) for step in range(start, start + steps)]


def everything(engine: Any) -> dict[str, Tensor]:
    """What a step may change, and what it depends on."""
    return {**row_state(engine), **parameter_state.capture(engine), **compute_copies(engine)}


def compute_copies(engine: Any) -> dict[str, Tensor]:
    """What the model computes with, of what is trained."""
    from deepspeed import zero

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"{name}/compute"] = parameter.detach().float().cpu().clone()
    return found


@dataclass
class Run:
    """Of one engine: what was captured and saved in its middle, and what came of it."""

    folder: Path
    tensors: dict[str, Tensor]
    compute: dict[str, Tensor]
    losses: list[float]
    """After the middle."""
    final: dict[str, Tensor]
    progress: tuple[Any, ...]


def progress(engine: Any) -> tuple[Any, ...]:
    return (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.get_lr())


@pytest.fixture(scope="module")
def run_at(tmp_path_factory) -> Callable[..., Run]:
    """Gives the run of an engine with these settings, which is made once."""
    runs: dict[str, Run] = {}

    def run(name: str, **settings: Any) -> Run:
        key = f"{name} {settings}"
        if key not in runs:
            engine = make_engine(name, **settings)
            train(engine)
            folder = tmp_path_factory.mktemp("run")
            engine.save_checkpoint(str(folder), tag="middle", client_state={"epoch": 3})
            tensors, compute = parameter_state.capture(engine), compute_copies(engine)
            losses = train(engine, STEPS)
            runs[key] = Run(folder / "middle", tensors, compute, losses, everything(engine), progress(engine))
            engine.destroy()
        return runs[key]

    return run


def model_states(folder: Path) -> dict[str, Any]:
    """DeepSpeed's, of whatever stage; nothing but tensors and plain values is allowed in it."""
    names = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
    return torch.load(next(path for name in names if (path := folder / name).exists()), weights_only=True)


def take_over(engine: Any, run: Run) -> None:
    """Let an engine go on where a run was in its middle."""
    client_state = parameter_state.restore_progress(engine, model_states(run.folder))
    assert client_state["epoch"] == 3 and not client_state.keys() & {"module", "optimizer", "lr_scheduler"}
    parameter_state.restore(engine, run.tensors)
    assert differing(parameter_state.capture(engine), run.tensors) == []
    compute = compute_copies(engine)
    for name, value in compute.items():
        master = run.tensors[name.replace("/compute", "/master")]
        assert torch.equal(value, master.to(_dtype(engine)).float()), name
    engine_state.load(engine, run.folder, resume=True)
    assert differing(compute, compute_copies(engine)) == [], "the adapter's file holds the same routers"


def _dtype(engine: Any) -> torch.dtype:
    return engine.get_data_types()[0]


def go_on(engine: Any, saved: Run, through: Run, *, exact: bool) -> None:
    """Take over, and train as the run that was not interrupted did."""
    take_over(engine, saved)
    losses = train(engine, STEPS)
    final = everything(engine)
    assert progress(engine) == through.progress
    if exact:
        assert losses == through.losses
        assert differing(final, through.final) == []
    else:
        assert losses == pytest.approx(through.losses, abs=1e-6)
        assert largest_difference(final, through.final) < 1e-6
    engine.destroy()


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "loaded"), ALL_STAGES)
def test_every_stage_takes_over_from_every_other(saved, loaded, precision, run_at):
    engine = make_engine(loaded, **precision)
    if saved == loaded:
        train(engine, 50, 2)  # so that there is something to replace
    go_on(engine, run_at(saved, **precision), run_at(loaded, **precision), exact=saved == loaded)


# --- layouts that only some engines have


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("0", "2, offloaded"), ("2, offloaded", "3, offloaded"), ("3, offloaded", "0"), ("3, offloaded", "3, offloaded")],
)
def test_what_is_offloaded_is_taken_over_too(saved, loaded, run_at):
    before, after = run_at(saved, **BF16), run_at(loaded, **BF16)
    go_on(make_engine(loaded, **BF16), before, after, exact=saved == loaded)


SMALL = {
    "whole on every rank": {"stage3_param_persistence_threshold": 100_000},
    "in several groups": {"sub_group_size": 100},
}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", SMALL.values(), ids=SMALL)
def test_small_parameters_of_stage_3(zero, precision, run_at):
    before, after = run_at("0", **precision), run_at("3", **precision, zero=zero)
    engine = make_engine("3", **precision, zero=zero)
    if "sub_group_size" in zero:
        assert len(engine.optimizer.fp16_groups) > 1
    go_on(engine, before, after, exact=False)
    go_on(make_engine("3", **precision, zero=zero), after, after, exact=True)


@pytest.mark.parametrize(("saved", "loaded"), [("0", "3"), ("3", "1")])
def test_an_anchor_alone(saved, loaded, run_at):
    settings = {"block": {"gate": "none"}, "lora": False}
    before = run_at(saved, **settings)
    assert [name for name in before.tensors if name.endswith("/master")] == [
        "model.layers.0.mlp.meft_adapter.anchor0/master"
    ]
    go_on(make_engine(loaded, **settings), before, run_at(loaded, **settings), exact=False)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """LoRA's matrices B with settings of their own."""
    ours = [p for name, p in model.named_parameters() if "lora_B" in name]
    others = [p for name, p in model.named_parameters() if "lora_B" not in name]
    own = {"params": ours, "lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.0}
    return torch.optim.AdamW([{"params": others}, own], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize(("saved", "loaded"), [("0", "2"), ("3", "0"), ("2", "3")])
def test_groups_keep_their_settings(saved, loaded, run_at):
    settings = {"optimizer": two_groups}
    before, after = run_at(saved, **settings), run_at(loaded, **settings)
    engine = make_engine(loaded, **settings)
    for group in engine.basic_optimizer.param_groups:
        group.update(lr=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.5)
    go_on(engine, before, after, exact=False)


OWN = {"torch_adam": False}
"""DeepSpeed's ``FusedAdam`` or, where the optimizer is offloaded, its ``DeepSpeedCPUAdam``."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("0", {}), ("2, offloaded", OWN)),
        (("2, offloaded", OWN), ("0", {})),
        (("2, offloaded", OWN), ("3, offloaded", OWN)),
        (("3, offloaded", OWN), ("3, offloaded", OWN)),
        (("0", {}), ("0", OWN)),
        (("0", OWN), ("0", OWN)),
        (("0", OWN), ("1", {})),
        (("3", {}), ("0", OWN)),
        (("2", OWN), ("3", OWN)),
    ],
)
def test_optimizers_of_deepspeed(saved, loaded, precision, run_at):
    """``slow``, since DeepSpeed compiles its fused and its CPU Adam on first use.

    Neither resumes to the last bit: they multiply the powers of beta step by step, and start with one that is computed.
    """
    (one, adam), (name, own_adam) = saved, loaded
    before, after = run_at(one, adam=adam, **precision), run_at(name, adam=own_adam, **precision)
    engine = make_engine(name, adam=own_adam, **precision)
    kind = type(engine.basic_optimizer).__name__
    assert kind == ("AdamW" if not own_adam else "DeepSpeedCPUAdam" if "offloaded" in name else "FusedAdam")
    go_on(engine, before, after, exact=False)
    if saved == loaded:
        resumed = make_engine(name, adam=own_adam, **precision)
        resumed.load_checkpoint(str(before.folder.parent), before.folder.name)
        losses = train(resumed, STEPS)
        expected = replace(after, losses=losses, final=everything(resumed))
        go_on(make_engine(name, adam=own_adam, **precision), before, expected, exact=True)


@pytest.fixture
def fp16_on_cpu(monkeypatch) -> None:
    """PyTorch computes in it there, and DeepSpeed asks the accelerator whether it does."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize(("saved", "loaded"), [("1", "3"), ("3", "2"), ("2", "2")])
def test_dynamic_loss_scales(saved, loaded, fp16_on_cpu, run_at):
    # So high that steps are skipped, and a window so short that it rises again.
    settings = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}}
    before, after = run_at(saved, **settings), run_at(loaded, **settings)
    go_on(make_engine(loaded, **settings), before, after, exact=saved == loaded)
    assert before.tensors["loss_scaler"].tolist() != after.final["loss_scaler"].tolist()
