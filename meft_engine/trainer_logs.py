"""Brings the engine's figures into what transformers' Trainer logs and its ``report_to`` integrations show, and tells
the run's log what a Trainer does.

A Trainer that knows nothing of MEFT has only its callbacks to be reached by, so the places through which all of them
pass are extended: methods of ``CallbackHandler``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from meft_engine.watching import watch_of, window_of

_KNOWN = ("loss", "lr", "grad_norm")
"""What Trainer logs itself."""


def extend() -> None:
    """Extend every Trainer whose model a MEFT engine trains; nothing else changes for any other."""
    module = sys.modules.get("transformers.trainer_callback")
    if module is None or hasattr(module.CallbackHandler.on_log, "__wrapped__"):
        return  # no Trainer has been imported, so none runs
    _extend_logs(module)
    _extend_beginning_and_end(module.CallbackHandler)


def _extend_logs(module: Any) -> None:
    original = module.CallbackHandler.on_log
    printing = (module.ProgressCallback, module.PrinterCallback)

    @functools.wraps(original)
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> Any:
        watch = watch_of(handler.model)
        if watch is not None and any(name.startswith("eval_") and name.endswith("loss") for name in logs):
            watch.recorder.validated(logs)
        window = window_of(handler.model) if "loss" in logs else None
        figures = window.read() if window is not None else {}
        if not figures:
            return original(handler, args, state, control, logs)
        added = {f"meft/{name}": value for name, value in figures.items() if name not in _KNOWN}
        state.log_history[-1].update(added)
        every = handler.callbacks
        try:
            # A line of twenty figures on the screen at every step would help nobody.
            handler.callbacks = [callback for callback in every if not isinstance(callback, printing)]
            control = original(handler, args, state, control, {**logs, **added})
            handler.callbacks = [callback for callback in every if isinstance(callback, printing)]
            return original(handler, args, state, control, logs)
        finally:
            handler.callbacks = every

    module.CallbackHandler.on_log = on_log


def _extend_beginning_and_end(handlers: Any) -> None:
    begin, end = handlers.on_train_begin, handlers.on_train_end

    @functools.wraps(begin)
    def on_train_begin(handler: Any, args: Any, *others: Any) -> Any:
        watch = watch_of(handler.model)
        if watch is not None and args.output_dir:
            watch.recorder.begin(Path(args.output_dir))
        return begin(handler, args, *others)

    @functools.wraps(end)
    def on_train_end(handler: Any, *others: Any) -> Any:
        watch = watch_of(handler.model)
        if watch is not None:
            watch.finish()
        return end(handler, *others)

    handlers.on_train_begin, handlers.on_train_end = on_train_begin, on_train_end
