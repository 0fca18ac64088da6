"""Brings the engine's figures into what transformers' Trainer logs and its ``report_to`` integrations show.

A Trainer that knows nothing of MEFT has only its callbacks to be reached by, so the one place through which all logs
pass is extended: ``CallbackHandler.on_log``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from meft_engine.watching import window_of

_KNOWN = ("loss", "lr", "grad_norm")
"""What Trainer logs itself."""


def extend() -> None:
    """Extend the logs of every Trainer whose model a MEFT engine trains; nothing else changes for any other."""
    module = sys.modules.get("transformers.trainer_callback")
    if module is None or hasattr(module.CallbackHandler.on_log, "__wrapped__"):
        return  # no Trainer has been imported, so none runs
    original = module.CallbackHandler.on_log
    printing = (module.ProgressCallback, module.PrinterCallback)

    @functools.wraps(original)
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> Any:
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
