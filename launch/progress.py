"""What a run shows while it runs: a bar on a terminal, lines elsewhere, JSON for programs, or nothing.

:class:`Progress` is a callback of transformers' Trainer and takes the place of its own ``ProgressCallback``. It
collects the figures; what becomes of them is up to one of four views.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich import progress as rich_progress
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

MODES = ("auto", "bar", "lines", "quiet", "json")

_RECENT = 50
"""Steps whose mean duration tells how long the rest will take."""

_EVAL = "eval_"


class Progress(TrainerCallback):
    """Collects a run's figures and gives them to its view, on the first rank alone.

    Speed counts training alone: neither evaluation nor saving. Tokens are those that the Trainer counts, over all ranks
    (``include_num_input_tokens_seen``); rows are known where a MEFT engine trains.
    """

    def __init__(self, mode: str = "auto", console: Console | None = None) -> None:
        """
        Args:
            mode: one of :data:`MODES`; ``auto`` is a bar on a terminal and lines elsewhere.
            console: where to show it; standard output unless given.
        """
        self.mode, console = _resolve(mode, console)
        self.view: _View = {"bar": _Bar, "lines": _Lines, "quiet": _View, "json": _Json}[self.mode](console)
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._warming_up = True
        self._since_log = 0.0
        self._tokens = 0
        self._evaluated = 0
        self._marked = time.perf_counter()

    @property
    def shows_data(self) -> bool:
        """Whether there is room for what people read before training."""
        return self.mode in ("bar", "lines")

    def silence_others(self) -> None:
        """No bars of reading, tokenizing and loading, where there is no room for what people read."""
        if not self.shows_data:
            import datasets

            datasets.disable_progress_bars()
            disable_progress_bar()

    def replace_in(self, trainer: Any) -> None:
        """Take the place of the Trainer's own callbacks that print."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def end(self, text: str, report: Mapping[str, Any]) -> None:
        """Show the summary of a run: ``text`` to people, ``report`` to programs."""
        self.view.end(text, report)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._tokens = state.num_input_tokens_seen
        self._marked = time.perf_counter()
        if state.is_world_process_zero:
            self.view.begin(state.global_step, state.max_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One micro-batch of several."""
        if state.is_world_process_zero:
            self.view.micro_step(1 / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step."""
        now = time.perf_counter()
        if self._warming_up:
            self._warming_up = len(self._seconds) == 0
            self._seconds.clear()  # the first step also compiles and fills caches
        self._seconds.append(now - self._marked)
        self._since_log += now - self._marked
        self._marked = now
        if state.is_world_process_zero:
            self.view.step(state.global_step, self._left(state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a save takes is no training."""
        self._marked = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Loss and what else is logged, with the speed since the last time."""
        if "loss" not in (logs or {}):
            return  # an evaluation, which comes by itself, or the sums at the end
        figures = {"step": state.global_step, "total": state.max_steps, **logs}
        for name in ("train_runtime", "train_tokens_per_second", "num_input_tokens_seen", "total_flos"):
            figures.pop(name, None)  # the Trainer's, of the whole run with its evaluations
        tokens, self._tokens = state.num_input_tokens_seen - self._tokens, state.num_input_tokens_seen
        if tokens > 0 and self._since_log > 0:
            figures["tokens"] = state.num_input_tokens_seen
            figures["tokens_per_second"] = tokens / self._since_log
        self._since_log = 0.0
        if self._seconds:
            figures["seconds_per_step"] = sum(self._seconds) / len(self._seconds)
            figures["seconds_left"] = self._left(state)
        if state.is_world_process_zero:
            self.view.log(figures)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """One batch of an evaluation."""
        self._evaluated += 1
        if state.is_world_process_zero:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.view.evaluating(self._evaluated, total)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The end of an evaluation."""
        self._evaluated = 0
        self._marked = time.perf_counter()
        if state.is_world_process_zero:
            found = {name.removeprefix(_EVAL): value for name, value in (metrics or {}).items()}
            self.view.evaluated({"step": state.global_step, **found})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the terminal to others."""
        self.close()

    def close(self) -> None:
        """Leave the terminal to others, however training has ended."""
        self.view.close()

    def _left(self, state: Any) -> float:
        """Seconds that the remaining steps will take, without evaluations."""
        return (state.max_steps - state.global_step) * sum(self._seconds) / max(1, len(self._seconds))


class _View:
    """Shows nothing but the summary; what the others build on."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, step: int, total: int) -> None:
        """Training starts after so many steps of a total."""

    def micro_step(self, share: float) -> None:
        """A share of a step is done."""

    def step(self, step: int, left: float) -> None:
        """A step is done; so many seconds are left."""

    def log(self, figures: Mapping[str, Any]) -> None:
        """Figures of the steps since the last time."""

    def evaluating(self, done: int, total: int | None) -> None:
        """So many batches of an evaluation are done."""

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        """An evaluation has ended."""

    def close(self) -> None:
        """Training has ended, well or not."""

    def end(self, text: str, report: Mapping[str, Any]) -> None:
        """The summary."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
        self.console.file.flush()


class _Lines(_View):
    def log(self, figures: Mapping[str, Any]) -> None:
        share = f"{figures['step'] / max(1, figures['total']):.0%}"
        left = [f"{_clock(figures['seconds_left'])} left"] if "seconds_left" in figures else []
        self._print("  ".join([f"step {figures['step']}/{figures['total']} ({share})", *_words(figures), *left]))

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        self._print(f"evaluation at step {figures['step']}  {'  '.join(_scores(figures))}")


class _Json(_View):
    def log(self, figures: Mapping[str, Any]) -> None:
        self._event("train", figures)

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        self._event("eval", figures)

    def end(self, text: str, report: Mapping[str, Any]) -> None:
        self._event("end", report)

    def _event(self, kind: str, figures: Mapping[str, Any]) -> None:
        self._print(json.dumps(_finite({"event": kind, **figures}), allow_nan=False))


class _Bar(_View):
    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar: rich_progress.Progress | None = None
        self._training: Any = None
        self._evaluation: Any = None
        self._open = ExitStack()
        atexit.register(self._open.close)  # a run that fails gives the terminal back as well

    def begin(self, step: int, total: int) -> None:
        self._start()
        self._training = self._bar.add_task(
            "training", total=total, completed=step, count=f"{step}/{total}", figures="", left=""
        )
        self._bar.refresh()

    def micro_step(self, share: float) -> None:
        if self._training is not None:
            self._bar.update(self._training, advance=share, refresh=True)

    def step(self, step: int, left: float) -> None:
        if self._training is not None:
            total = int(self._bar.tasks[0].total)
            self._bar.update(
                self._training, completed=step, count=f"{step}/{total}", left=f"{_clock(left)} left", refresh=True
            )

    def log(self, figures: Mapping[str, Any]) -> None:
        if self._training is not None:
            words = _words({name: value for name, value in figures.items() if name in _ON_THE_BAR})
            self._bar.update(self._training, figures="  ".join(words), refresh=True)

    def evaluating(self, done: int, total: int | None) -> None:
        self._start()
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("evaluation", total=total, count="", figures="", left="")
        count = f"{done}/{total}" if total else str(done)
        self._bar.update(self._evaluation, completed=done, count=count, refresh=True)

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        if self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None
        self._print(f"evaluation at step {figures['step']}  {'  '.join(_scores(figures))}")
        if self._training is None:
            self.close()

    def close(self) -> None:
        self._open.close()
        self._bar = self._training = self._evaluation = None

    def end(self, text: str, report: Mapping[str, Any]) -> None:
        self.close()
        super().end(text, report)

    def _start(self) -> None:
        if self._bar is not None:
            return
        columns = [rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(bar_width=24)]
        columns += [rich_progress.TextColumn(f"{{task.fields[{name}]}}") for name in ("count", "figures", "left")]
        # Drawn when something happens: a thread that draws could hold a lock while workers are forked.
        own = {"auto_refresh": False, "redirect_stdout": True, "redirect_stderr": sys.stderr.isatty()}
        self._open.enter_context(_logging_through(self.console))
        self._bar = self._open.enter_context(rich_progress.Progress(*columns, console=self.console, **own))


_DULL = ("step", "epoch", "samples_per_second", "steps_per_second", "num_input_tokens_seen", "model_preparation_time")
_ON_THE_BAR = ("loss", "tokens_per_second", "meft/touched_share")


def _resolve(mode: str, console: Console | None) -> tuple[str, Console]:
    if console is None:
        console = Console(force_terminal=True if mode == "bar" else None)
    if mode == "auto":
        mode = "bar" if console.is_terminal and not console.is_dumb_terminal else "lines"
    return mode, console


@contextmanager
def _logging_through(console: Console) -> Iterator[None]:
    """Messages of loggers that write to the terminal appear above the bar.

    A handler keeps the stream that it was made with, which is not the one that the bar has put in its place.
    """
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    changed: list[tuple[logging.StreamHandler, TextIO]] = []
    for handler in handlers:
        stream = vars(handler).get("stream")  # one that looks for it anew each time needs no help
        if isinstance(handler, logging.StreamHandler) and stream in (sys.stdout, sys.stderr) and stream.isatty():
            changed.append((handler, stream))
            handler.setStream(FileProxy(console, stream))
    try:
        yield
    finally:
        for handler, stream in changed:
            handler.setStream(stream)


def _words(figures: Mapping[str, Any]) -> list[str]:
    """Of training, as people read them; what is absent is left out."""
    forms = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "meft/touched_share": "touched {:.1%}",
        "seconds_per_step": "{:.2f} s a step",
    }
    return [form.format(float(figures[name])) for name, form in forms.items() if name in figures]


def _scores(figures: Mapping[str, Any]) -> list[str]:
    """Of an evaluation: its metrics, without what the Trainer says of speed."""
    numbers = {name: value for name, value in figures.items() if name not in _DULL and isinstance(value, (int, float))}
    seconds = numbers.pop("runtime", None)
    found = [f"{name} {value:.4f}" for name, value in numbers.items()]
    return [*found, f"{seconds:.1f} s"] if seconds is not None else found


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"


def _finite(value: Any) -> Any:
    """JSON has no word for a number that is not finite: null."""
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
