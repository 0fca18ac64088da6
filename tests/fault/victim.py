"""One of two ranks that are killed while they save: ``… victim FOLDER STAGE BACKGROUND PHASE WHO DELAY``.

It goes on from the newest checkpoint, takes a step, notes what it then is, and saves. When rank 0 reaches the phase, it
kills ``WHO`` (``0``, ``1`` or ``all``) after so many seconds; the phase ``none`` never comes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.integration.engines import router_values
from tests.ranks import member
from tests.ranks.cases import Case, loss_of, sentences


class AtPhase(logging.Handler):
    """Does something when a save reaches a phase."""

    def __init__(self, phase: str, do: Callable[[], None]) -> None:
        super().__init__(logging.DEBUG)
        self._phase, self._do = phase, do

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().endswith(f": {self._phase}"):
            self._do()


def digest(engine: Any) -> str:
    """Of all that this rank would resume with."""
    found = hashlib.sha256()
    rows, state = member.rows_and_state(engine)
    parts = {**rows, **state, **{name: (None, value) for name, value in router_values(engine).items()}}
    for name in sorted(parts):
        found.update(parts[name][1].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(folder: Path, stage: int, background: bool, phase: str, who: str, delay: float) -> None:
    """See the top of this file."""
    rank, size = dist.get_rank(), dist.get_world_size()
    checkpoint = {"async_save": background, "keep_last": 2}
    case = Case("victim", stage=stage, sections={"communication": {"timeout": 6.0}, "checkpoint": checkpoint})
    engine = member.start(case, rank)
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
        print(f"resumed {engine.global_steps} {digest(engine)}", flush=True)

    def step() -> None:
        loss = loss_of(engine, *sentences(case, engine.global_steps, 0, rank, size))
        engine.backward(loss)
        engine.step()

    step()
    engine.synchronize_rows()
    print(f"saves {engine.global_steps} {digest(engine)}", flush=True)
    dist.barrier()

    def kill() -> None:
        others = [number for number in range(size) if number != rank and who in ("all", str(number))]
        for number in others + ([rank] if who in ("all", "0") else []):
            os.kill(engine.ranks.processes[number], signal.SIGKILL)

    if rank == 0:
        logger = logging.getLogger("meft_engine")
        logger.setLevel(logging.DEBUG)
        now = kill if not delay else lambda: threading.Timer(delay, kill).start()
        logger.addHandler(AtPhase(phase, now))
    engine.save_checkpoint(str(folder))
    for _ in range(2):
        step()
    engine._saver.finish()
    print("saved", flush=True)
    if phase != "none":
        time.sleep(60)  # to be killed
    engine.destroy()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "background", *sys.argv[4:6], float(sys.argv[6]))
    dist.destroy_process_group()
