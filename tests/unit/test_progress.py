"""What a run shows: a bar that messages do not garble, lines, JSON, nothing; with rows or without."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import progress as progress_module
import pyte
import pytest
from finetune_arguments import Parser
from progress import MODES, Progress
from rich.console import Console
from transformers import TrainerControl, TrainerState

logger = logging.getLogger("meft_engine.test_progress")
STEPS, SAVED_AT, EVALUATED_AT = 4, 3, 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def fake_run(
    progress: Progress,
    clock: Callable[[float], None] = time.sleep,
    *,
    rank: int = 0,
    meft: bool = True,
    resumed: int = 0,
) -> None:
    """What a Trainer calls: four steps of two micro-batches, the first of 9 s and the others of 2 s and 100 tokens."""
    args, control = SimpleNamespace(gradient_accumulation_steps=2), TrainerControl()
    state = TrainerState(max_steps=STEPS, is_world_process_zero=rank == 0, global_step=resumed)
    state.num_input_tokens_seen = 100 * resumed

    def tell(event: str, **more: Any) -> None:
        getattr(progress, event)(args, state, control, **more)

    tell("on_train_begin")
    for step in range(resumed + 1, STEPS + 1):
        tell("on_substep_end")
        state.num_input_tokens_seen += 100
        clock(9 if step == resumed + 1 else 2)
        state.global_step = step
        tell("on_step_end")
        logger.warning("message at step %d [bold]", step)
        logs = {"loss": 1 / step, "learning_rate": 1e-4, "grad_norm": float("nan"), "train_runtime": 7.0}
        rows = {"meft/touched_share": 0.25, "meft/kept_mass": 1.0} if meft else {}
        tell("on_log", logs={**logs, **rows})
        if step == SAVED_AT:
            clock(1000)
            tell("on_save")
        if step == EVALUATED_AT:
            for _ in range(3):
                clock(1000)
                tell("on_prediction_step", eval_dataloader=[0, 0, 0])
            metrics = {"eval_loss": 0.5, "eval_runtime": 3000.0, "eval_samples_per_second": 9.0}
            tell("on_log", logs=metrics)
            tell("on_evaluate", metrics=metrics)
    tell("on_log", logs={"train_loss": 0.5})
    tell("on_train_end")
    if rank == 0:
        progress.end("Finished: 4 steps", {"steps": STEPS, "train_loss": float("inf")})


def shown(mode: str, clock: Callable[[float], None], **run: Any) -> list[str]:
    file = io.StringIO()
    fake_run(Progress(mode, Console(file=file, width=40)), clock, **run)
    return file.getvalue().splitlines()


def test_lines(clock):
    assert shown("lines", clock) == [
        "step 1/4 (25%)  loss 1.0000  lr 1.0e-04  11 tokens/s  touched 25.0%  9.00 s a step  0:00:27 left",
        "step 2/4 (50%)  loss 0.5000  lr 1.0e-04  50 tokens/s  touched 25.0%  2.00 s a step  0:00:04 left",
        "evaluation at step 2  loss 0.5000  3000.0 s",
        "step 3/4 (75%)  loss 0.3333  lr 1.0e-04  50 tokens/s  touched 25.0%  2.00 s a step  0:00:02 left",
        "step 4/4 (100%)  loss 0.2500  lr 1.0e-04  50 tokens/s  touched 25.0%  2.00 s a step  0:00:00 left",
        "Finished: 4 steps",
    ]


def test_plain_deepspeed_has_no_rows_to_touch(clock):
    lines = shown("lines", clock, meft=False)
    assert len(lines) == 6 and not any("touched" in line for line in lines) and "tokens/s" in lines[0]


def test_a_resumed_run_goes_on_counting(clock):
    first, *_ = shown("lines", clock, resumed=2)
    assert first.startswith("step 3/4 (75%)") and "  11 tokens/s  " in first, "tokens of before are no speed"


def test_json_has_one_object_for_each_event(clock):
    events = [json.loads(line, parse_constant=pytest.fail) for line in shown("json", clock)]
    assert [event["event"] for event in events] == ["train", "train", "eval", "train", "train", "end"]
    assert events[1] == {
        "event": "train",
        "step": 2,
        "total": 4,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": None,
        "meft/touched_share": 0.25,
        "meft/kept_mass": 1.0,
        "tokens": 200,
        "tokens_per_second": 50.0,
        "seconds_per_step": 2.0,
        "seconds_left": 4.0,
    }
    assert events[2] == {"event": "eval", "step": 2, "loss": 0.5, "runtime": 3000.0, "samples_per_second": 9.0}
    assert events[-1] == {"event": "end", "steps": 4, "train_loss": None}


def test_quiet_shows_the_summary_alone(clock):
    assert shown("quiet", clock) == ["Finished: 4 steps"]


@pytest.mark.parametrize("mode", MODES)
def test_other_ranks_show_nothing(mode, clock):
    assert shown(mode, clock, rank=1) == []


def test_without_a_terminal_auto_is_lines(clock):
    assert shown("auto", clock) == shown("lines", clock)
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert (Progress("auto", terminal).mode, Progress("auto", dumb).mode) == ("bar", "lines")


class Terminal:
    """A pseudo-terminal, and what a person would see on it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self._screen = pyte.Screen(100, 30)
        self._stream = pyte.ByteStream(self._screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # the other end is closed
                return
            self._stream.feed(data)

    def lines(self) -> list[str]:
        """Its lines, once nothing is written any more."""
        self.file.close()
        self._reader.join(timeout=20)
        os.close(self._master)
        return [line.rstrip() for line in self._screen.display if line.strip()]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """With a logger that was given it before there was a bar."""
    made = Terminal()
    handler = logging.StreamHandler(made.file)
    logger.addHandler(handler)
    yield made
    logger.removeHandler(handler)
    assert handler.stream is made.file, "given back"


def bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Where the terminal is standard output and error; pytest has its own between a fixture and the test."""
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    return Progress("auto", Console(file=terminal.file, width=100, _environ={"TERM": "xterm"}))


def test_a_bar_stands_below_messages_and_evaluations(terminal, clock, monkeypatch):
    fake_run(bar(terminal, monkeypatch), clock)
    *above, last, end = terminal.lines()
    assert above == [
        "message at step 1 [bold]",
        "message at step 2 [bold]",
        "evaluation at step 2  loss 0.5000  3000.0 s",
        "message at step 3 [bold]",
        "message at step 4 [bold]",
    ]
    assert last.startswith("training ━━━━")
    assert last.endswith("4/4 loss 0.2500  50 tokens/s  touched 25.0% 0:00:00 left")
    assert end == "Finished: 4 steps"


def test_a_bar_shows_where_it_is(terminal, monkeypatch):
    """In the second micro-batch of the third step, and in an evaluation."""
    progress = bar(terminal, monkeypatch)
    args, state = SimpleNamespace(gradient_accumulation_steps=2), TrainerState(max_steps=4, global_step=2)
    progress.on_train_begin(args, state, None)
    progress.on_substep_end(args, state, None)
    progress.on_prediction_step(args, state, None, eval_dataloader=[0] * 5)
    assert [(task.completed, task.total) for task in progress.view._bar.tasks] == [(2.5, 4), (1, 5)]
    progress.view.close()  # as it is
    training, evaluation = terminal.lines()
    assert training.startswith("training   ━") and "2/4" in training
    assert evaluation.startswith("evaluation ━") and "1/5" in evaluation


def test_an_evaluation_after_training_has_a_bar_of_its_own(terminal, monkeypatch):
    progress = bar(terminal, monkeypatch)
    progress.on_prediction_step(None, TrainerState(global_step=9), None, eval_dataloader=[0])
    progress.on_evaluate(None, TrainerState(global_step=9), None, metrics={"eval_loss": 2.0})
    assert sys.stdout is terminal.file, "left to others"
    assert terminal.lines() == ["evaluation at step 9  loss 2.0000"]


def test_errors_that_go_elsewhere_stay_there(terminal, monkeypatch):
    """Standard error in a file: neither what is printed there nor messages come to the terminal."""
    file = io.StringIO()
    progress = bar(terminal, monkeypatch)
    monkeypatch.setattr(sys, "stderr", file)
    handler = logging.StreamHandler(file)
    logger.addHandler(handler)
    progress.on_train_begin(None, TrainerState(max_steps=4), None)
    print("to the file", file=sys.stderr)
    logger.warning("there too")
    progress.on_train_end(None, TrainerState(max_steps=4), None)
    logger.removeHandler(handler)
    assert file.getvalue() == "to the file\nthere too\n"
    assert "to the file" not in "".join(terminal.lines())


def test_an_unknown_way_of_showing_is_refused(capsys):
    line = ["--model_name_or_path", "m", "--train_file", "a", "--output_dir", "o", "--use_cpu", "--progress", "loud"]
    with pytest.raises(SystemExit):
        Parser().parse(line)
    assert "progress = 'loud' is not known; use auto, bar, lines, quiet, json" in capsys.readouterr().err
