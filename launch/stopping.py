"""A training that is asked to stop saves a checkpoint first.

SIGTERM, SIGUSR1 and SIGUSR2 mean the same: save at the end of the step that is running, and leave with exit code 75.
``enable_jit_checkpoint`` of transformers does not do for this: every rank obeys a signal by itself, so that ranks that
get it in different steps wait for each other for ever; it saves inside accumulation windows too, whose gradients no
checkpoint holds; and afterwards training counts as finished.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. Kubernetes, for one, would take 0 for a training that is done."""


class StopRequested(Exception):
    """Training ends here because a signal asked for it; the checkpoint is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped after step {step}, as a signal asked, with a checkpoint; go on with --resume_from_checkpoint True"
        )


class StopOnSignal(TrainerCallback):
    """Raises :class:`StopRequested` out of ``Trainer.train`` at the first step's end after a signal, once it is saved.

    All ranks do so after the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self._received = self._stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen from now on; before, there is nothing to save."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer for a checkpoint if any rank was asked to stop; a training that is done finishes instead."""
        if self._anyone_received(args) and state.global_step < state.max_steps:
            self._stopping = control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave; what the Trainer does when training is done, such as loading the best checkpoint, has to wait."""
        if self._stopping:
            for number in SIGNALS:  # a repeated one would kill Python on its way out, where handlers are gone
                signal.signal(number, signal.SIG_IGN)
            raise StopRequested(state.global_step)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def _anyone_received(self, args: Any) -> bool:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return self._received
        flag = torch.tensor([int(self._received)], dtype=torch.int32, device=args.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())
