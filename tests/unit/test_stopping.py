"""A signal ends a training at a step's end, once it is saved, on all ranks after the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune
import pytest
import stopping
from stopping import SIGNALS, StopOnSignal, StopRequested
from transformers import TrainerControl, TrainerState

ARGS = SimpleNamespace(device="cpu")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def at_step(step: int, last: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_saves_first_and_leaves_then(number: int) -> None:
    callback, control = StopOnSignal(), TrainerControl()
    callback.on_train_begin(ARGS, at_step(0), control)
    callback.on_step_end(ARGS, at_step(1), control)
    callback.on_save(ARGS, at_step(1), control)
    assert not control.should_save, "nobody has asked"
    os.kill(os.getpid(), number)
    callback.on_step_end(ARGS, at_step(2), control)
    assert control.should_save and control.should_log
    with pytest.raises(StopRequested, match="after step 2"):
        callback.on_save(ARGS, at_step(2), control)
    os.kill(os.getpid(), number)  # a repeated one does no harm on the way out
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_training_that_is_done_finishes() -> None:
    callback, control = StopOnSignal(), TrainerControl()
    callback.on_train_begin(ARGS, at_step(0), control)
    os.kill(os.getpid(), signal.SIGUSR1)
    callback.on_step_end(ARGS, at_step(10), control)
    callback.on_save(ARGS, at_step(10), control)
    assert not control.should_save


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_a_rank_leaves_when_another_was_asked(elsewhere: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(flag: Any, op: Any) -> None:
        assert op == stopping.distributed.ReduceOp.MAX
        flag.clamp_(min=elsewhere)

    monkeypatch.setattr(stopping.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(stopping.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(stopping.distributed, "all_reduce", all_reduce)
    callback, control = StopOnSignal(), TrainerControl()
    callback.on_step_end(ARGS, at_step(4), control)
    assert control.should_save == bool(elsewhere)


def test_auto_goes_on_from_what_is_whole_and_else_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finetune.find_checkpoint("auto", str(tmp_path / "nothing")) is None
    found = tmp_path / "checkpoint-3"
    monkeypatch.setattr(finetune, "newest_whole", lambda folder: found)
    assert finetune.find_checkpoint("auto", str(tmp_path)) == str(found)
