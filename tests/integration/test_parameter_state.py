"""What trains beside the rows goes on under any ZeRO stage, from what was captured under any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from meft_engine.checkpoint import engine_state, parameter_state
from meft_engine.config import MeftConfigError
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    largest_difference,
    lm_loss,
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


def make_engine(name: str, *, lora: bool = True, adam: dict[str, Any] | None = None, **settings: Any) -> Any:
    """At a stage of :data:`STAGES`, with a schedule, one norm and a buffer."""
    model = tiny_llama(num_hidden_layers=2)
    model.counting = Counting()
    model.register_forward_hook(lambda module, *_: module.counting())
    if lora:
        model = with_lora(model, ["q_proj", "v_proj"])
    settings = {"scheduler": SCHEDULE, "clip": 0.5, **settings}
    engine = build_engine(model, adam={**ADAM, **(adam or {})}, **STAGES[name], **settings)
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
    assert differing(compute, compute_copies(engine)) == [] or _dtype(engine) == torch.float32


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


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("saved", "loaded"), ALL_STAGES)
def test_every_stage_takes_over_from_every_other(saved, loaded, bf16, run_at):
    lora = not bf16
    engine = make_engine(loaded, bf16=bf16, lora=lora)
    if saved == loaded:
        train(engine, 50, 2)  # so that there is something to replace
    before, after = run_at(saved, bf16=bf16, lora=lora), run_at(loaded, bf16=bf16, lora=lora)
    go_on(engine, before, after, exact=saved == loaded)
