"""What trains beside the rows goes on under any ZeRO stage, from what was captured under any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from meft_engine.checkpoint import parameter_state
from meft_engine.config import MeftConfigError
from tests.integration.engines import (
    batch,
    differing,
    largest_difference,
    row_state,
    train_step,
)
from tests.integration.parameters import compute_copies, make_engine, model_states, take_over

STEPS = 3
"""Before the change, and after it."""

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


def train(engine: Any, start: int = 0, steps: int = STEPS) -> list[float]:
    """The losses of some steps."""
    return [train_step(engine, [batch(100 + step, size=2, length=8)]) for step in range(start, start + steps)]


def everything(engine: Any) -> dict[str, Tensor]:
    """What a step may change, and what it depends on."""
    return {**row_state(engine), **parameter_state.capture(engine), **compute_copies(engine)}


@dataclass
class Run:
    """Of one engine: what was captured and saved in its middle, and what came of it."""

    folder: Path
    tensors: dict[str, Tensor]
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
            engine = make_engine(**STAGES[name], **settings)
            train(engine)
            folder = tmp_path_factory.mktemp("run")
            engine.save_checkpoint(str(folder), tag="middle", client_state={"epoch": 3})
            tensors = parameter_state.capture(engine)
            losses = train(engine, STEPS)
            runs[key] = Run(folder / "middle", tensors, losses, everything(engine), progress(engine))
            engine.destroy()
        return runs[key]

    return run


def go_on(engine: Any, saved: Run, through: Run, *, exact: bool) -> None:
    """Take over, and train as the run that was not interrupted did."""
    take_over(engine, saved.folder, saved.tensors)
    losses = train(engine, STEPS)
    final = everything(engine)
    assert progress(engine) == through.progress
    if exact:
        assert losses == through.losses
        assert differing(final, through.final) == []
    else:
        # Stages sum in different orders, and a step of Adam makes 0.01 of whatever a gradient near zero is.
        assert losses == pytest.approx(through.losses, rel=1e-6)
        assert largest_difference(final, through.final) < 3e-6
    engine.destroy()


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "loaded"), ALL_STAGES)
def test_every_stage_takes_over_from_every_other(saved, loaded, precision, run_at):
    engine = make_engine(**STAGES[loaded], **precision)
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
    go_on(make_engine(**STAGES[loaded], **BF16), before, after, exact=saved == loaded)


SMALL = {
    "whole on every rank": {"stage3_param_persistence_threshold": 100_000},
    "in several groups": {"sub_group_size": 100},
}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", SMALL.values(), ids=SMALL)
def test_small_parameters_of_stage_3(zero, precision, run_at):
    before, after = run_at("0", **precision), run_at("3", **precision, zero=zero)
    engine = make_engine(**STAGES["3"], **precision, zero=zero)
    if "sub_group_size" in zero:
        assert len(engine.optimizer.fp16_groups) > 1
    else:
        train(engine, 50, 1)
        assert all(p.numel() for p in engine.module.parameters() if p.requires_grad)
    go_on(engine, before, after, exact=False)
    go_on(make_engine(**STAGES["3"], **precision, zero=zero), after, after, exact=True)


@pytest.mark.parametrize(("saved", "loaded"), [("0", "3"), ("3", "1")])
def test_an_anchor_alone(saved, loaded, run_at):
    settings = {"block": {"gate": "none"}, "lora": False}
    before = run_at(saved, **settings)
    assert [name for name in before.tensors if name.endswith("/master")] == [
        "model.layers.0.mlp.meft_adapter.anchor0/master"
    ]
    go_on(make_engine(**STAGES[loaded], **settings), before, run_at(loaded, **settings), exact=False)


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
    engine = make_engine(**STAGES[loaded], **settings)
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
    engine = make_engine(**STAGES[name], adam=own_adam, **precision)
    kind = type(engine.basic_optimizer).__name__
    assert kind == ("AdamW" if not own_adam else "DeepSpeedCPUAdam" if "offloaded" in name else "FusedAdam")
    go_on(engine, before, after, exact=False)
    if saved == loaded:
        resumed = make_engine(**STAGES[name], adam=own_adam, **precision)
        resumed.load_checkpoint(str(before.folder.parent), before.folder.name)
        losses = train(resumed, STEPS)
        expected = replace(after, losses=losses, final=everything(resumed))
        go_on(make_engine(**STAGES[name], adam=own_adam, **precision), before, expected, exact=True)


@pytest.fixture
def fp16_on_cpu(monkeypatch) -> None:
    """PyTorch computes in it there, and DeepSpeed asks the accelerator whether it does."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize(("saved", "loaded"), [("1", "3"), ("3", "2"), ("2", "2")])
def test_dynamic_loss_scales(saved, loaded, fp16_on_cpu, run_at):
    # So high that steps are skipped, and a window so short that it rises again.
    settings = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}}
    before, after = run_at(saved, **settings), run_at(loaded, **settings)
    go_on(make_engine(**STAGES[loaded], **settings), before, after, exact=saved == loaded)
    assert before.tensors["loss_scaler"].tolist() != after.final["loss_scaler"].tolist()


# --- what is captured


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_what_is_captured_is_what_the_optimizer_holds(name, bf16):
    engine = make_engine(**STAGES[name], bf16=bf16)
    train(engine)
    tensors = parameter_state.capture(engine)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    kinds = ("master", "exp_avg", "exp_avg_sq", "step", "settings")
    assert tensors.keys() == {f"{name}/{kind}" for name in trained for kind in kinds}
    held = _held_at_stage_0(engine) if name == "0" else {}
    for parameter_name, parameter in trained.items():
        for kind in kinds[:3]:
            if name == "0":
                master = held[parameter]
                expected = master if kind == "master" else engine.basic_optimizer.state[master][kind]
            elif kind == "master":
                expected = safe_get_full_fp32_param(parameter)
            else:
                expected = safe_get_full_optimizer_state(parameter, kind)
            found = tensors[f"{parameter_name}/{kind}"]
            assert found.dtype == torch.float32 and torch.equal(found, expected.detach())
        assert tensors[f"{parameter_name}/step"].tolist() == STEPS
        assert tensors[f"{parameter_name}/settings"].tolist() == [*engine.get_lr(), 0.9, 0.99, 1e-6, 0.1]


def _held_at_stage_0(engine: Any) -> dict[nn.Parameter, Tensor]:
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    own = getattr(engine.optimizer, "fp16_groups", groups)
    return {
        half: held
        for halves, masters in zip(own, groups, strict=True)
        for half, held in zip(halves, masters, strict=True)
    }


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_before_the_first_step_there_are_no_moments(name, bf16):
    settings = {**STAGES[name], "bf16": bf16}
    fresh, engine = make_engine(**settings), make_engine(**settings)
    tensors = parameter_state.capture(fresh)
    assert {key.rpartition("/")[2] for key in tensors} == {"master", "settings"}
    train(engine, 50, 2)
    parameter_state.restore(engine, tensors)
    assert differing(parameter_state.capture(engine), tensors) == []
    train(engine, steps=1)
    assert {int(value) for key, value in parameter_state.capture(engine).items() if key.endswith("/step")} == {1}


@pytest.mark.parametrize(("name", "counts"), [("0", [3, 2, None]), ("2", [3, 3, 3]), ("3", [3, 3, 3])])
def test_one_count_of_steps_for_what_is_flat(name, counts, run_at):
    """At stage 0, what never got a gradient has no moments, and what seldom got one has its own count."""
    tensors = dict(run_at("0", **FP32).tensors)
    names = [key.removesuffix("/master") for key in tensors if key.endswith("/master")]
    seldom, never = names[0], names[-1]
    tensors[f"{seldom}/step"] = tensors[f"{seldom}/step"] - 1
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        del tensors[f"{never}/{kind}"]
    engine = make_engine(**STAGES[name])
    parameter_state.restore(engine, tensors)
    found = parameter_state.capture(engine)
    steps = [found.get(f"{key}/step") for key in (names[1], seldom, never)]
    assert [None if step is None else int(step) for step in steps] == counts
    for kind in ("exp_avg", "exp_avg_sq"):
        assert not found.get(f"{never}/{kind}", torch.zeros(1)).any()
        assert torch.equal(found[f"{seldom}/{kind}"], tensors[f"{seldom}/{kind}"])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["1", "2, offloaded", "3"])
def test_deepspeed_shows_what_was_restored(name, trained, run_at):
    tensors = run_at("0", **FP32).tensors
    engine = make_engine(**STAGES[name])
    if trained:
        train(engine, 50, 1)
    parameter_state.restore(engine, tensors)
    for parameter_name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for kind in ("exp_avg", "exp_avg_sq"):
                shown = safe_get_full_optimizer_state(parameter, kind)
                assert torch.equal(shown, tensors[f"{parameter_name}/{kind}"])


# --- the run's progress


def test_buffers_and_the_rate_are_restored(run_at):
    saved = run_at("3", **FP32)
    engine = make_engine(**STAGES["0"])
    parameter_state.restore_progress(engine, model_states(saved.folder))
    counting = engine.module.get_submodule("base_model.model.counting")
    assert (counting.batches.item(), counting.passing.item()) == (STEPS, 0.0)
    assert engine.lr_scheduler.last_batch_iteration == STEPS - 1


def test_the_schedule_may_begin_anew(run_at):
    saved = run_at("0", **FP32)
    engine = make_engine(**STAGES["2"])
    before = engine.lr_scheduler.state_dict()
    client_state = parameter_state.restore_progress(engine, model_states(saved.folder), lr_scheduler=False)
    assert engine.lr_scheduler.state_dict() == before
    assert client_state["lr_scheduler"] != before and engine.global_steps == STEPS


def test_a_buffer_of_another_shape_is_refused(run_at):
    states = model_states(run_at("0", **FP32).folder)
    states["module"]["base_model.model.counting.batches"] = torch.zeros(2)
    engine = make_engine(**STAGES["0"])
    with pytest.raises(MeftConfigError, match=r"counting.batches was saved with shape \(2,\), where \(1,\) is needed"):
        parameter_state.restore_progress(engine, states)
    assert engine.global_steps == 0


# --- what is refused


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name not in names}


ROUTER = "base_model.model.model.layers.1.mlp.meft_adapter.router"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a parameter is missing": (lambda t: without(t, f"{ROUTER}/master"), r"router/master is missing, where \(5, 32\)"),
    "settings are missing": (lambda t: without(t, f"{ROUTER}/settings"), r"router/settings is missing"),
    "a moment is missing": (lambda t: without(t, f"{ROUTER}/exp_avg_sq"), r"router/exp_avg_sq is missing"),
    "the steps are missing": (lambda t: without(t, f"{ROUTER}/step"), r"router/step is missing"),
    "another shape": (lambda t: {**t, f"{ROUTER}/master": torch.zeros(4, 32)}, r"has shape \(4, 32\), where \(5, 32\)"),
    "the shape of a moment": (lambda t: {**t, f"{ROUTER}/exp_avg": torch.zeros(5)}, r"exp_avg has shape \(5,\)"),
    "a parameter too many": (lambda t: {**t, "other/master": torch.zeros(1)}, r"other/master was saved, and no param"),
    "other settings": (
        lambda t: {**t, f"{ROUTER}/settings": 2 * t[f"{ROUTER}/settings"]},
        rf"{ROUTER} and .*lora_A.*were saved with other settings",
    ),
}


@pytest.mark.parametrize("name", ["0", "2", "3"])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(change, message, name, run_at):
    engine = make_engine(**STAGES[name])
    train(engine, 50, 1)
    before = everything(engine)
    with pytest.raises(MeftConfigError, match=message):
        parameter_state.restore(engine, change(run_at("0", **FP32).tensors))
    assert differing(everything(engine), before) == []
    engine.destroy()


class Foreign(torch.optim.Optimizer):
    """Has the name of one of Adam's family."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})


Foreign.__name__ = "AdamW"


def test_what_cannot_be_captured_is_said(monkeypatch):
    assert all(parameter_state.supported(make_engine(**STAGES[name])) is None for name in STAGES)
    unfrozen = make_engine(lora=False, block={"freeze_base": False})
    assert "base model trains too" in parameter_state.supported(unfrozen)
    foreign = make_engine(optimizer=Foreign)
    assert "AdamW keeps its state in a way of its own" in parameter_state.supported(foreign)
    divided = make_engine(**STAGES["3, offloaded"])
    divided.optimizer.backup_optimizer = None
    assert "two optimizers" in parameter_state.supported(divided)
    swapped = make_engine(**STAGES["3, offloaded"])
    monkeypatch.setattr(swapped._config.zero_config.offload_param, "device", "nvme")
    assert "offload_param keeps its tensors on NVMe" in parameter_state.supported(swapped)
