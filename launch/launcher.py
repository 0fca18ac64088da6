"""How scripts here start others: through DeepSpeed's launcher, with what these need in their environment."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from data import DataError

HERE = Path(__file__).resolve().parent


def environment(*, cpu: bool) -> dict[str, str]:
    """This process's variables, and what sub-processes need: the compiler tools of this Python's folder, few threads.

    Args:
        cpu: DeepSpeed is to train on the CPU.
    """
    tools = str(Path(sys.executable).parent)
    values = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    values.setdefault("TOKENIZERS_PARALLELISM", "false")
    values["PYTHONUNBUFFERED"] = "1"
    if cpu:
        values["DS_ACCELERATOR"] = "cpu"
    return values


def deepspeed_command(*options: str) -> list[str]:
    """``deepspeed`` of this Python's environment.

    Raises:
        DataError: if it is not installed there.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.is_file():
        raise DataError(f"{launcher} does not exist; install deepspeed into the environment of {sys.executable}")
    return [str(launcher), *options]


def script(name: str, *arguments: str) -> list[str]:
    """The command that runs a script of this folder."""
    return [sys.executable, str(HERE / name), *arguments]


def options(values: dict[str, object]) -> list[str]:
    """``--name=value`` for each; a list becomes several values of one option, and ``None`` leaves the option out."""
    found = []
    for name, value in values.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            found += [f"--{name}", *map(str, value)]
        elif value is not None:
            found.append(f"--{name}={value}")
    return found


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remove_buffers(port: int) -> None:
    """Remove DeepSpeed's communication buffers, 69 MB of memory, which it leaves behind under the port's name."""
    for left_over in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left_over.unlink(missing_ok=True)
