"""The cores that belong to this process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def rank_cores() -> set[int]:
    """The cores that this process may use: the union over its threads, since OpenMP may have bound some of them."""
    cores: set[int] = set()
    try:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                cores |= os.sched_getaffinity(int(task.name))
    except OSError:
        pass
    return cores or set(range(os.cpu_count() or 1))
