"""How much memory there is: of the machine, of the container, of the process, of the device, whichever is least."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

from meft_engine.config import MeftConfig, MeftConfigError

GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 writes the largest multiple of a page that fits 64 bits


@dataclass(frozen=True)
class Limit:
    """Bytes that can still be taken, and who says so."""

    bytes: int
    source: str
    """Empty: the machine's free memory."""

    def __str__(self) -> str:
        return f"{self.bytes / GIB:.1f} GiB are available" + (f" ({self.source})" if self.source else "")


def host_limit(root: Path = Path("/")) -> Limit:
    """What this process can still take of host memory.

    The least of what the machine has available, what the memory cgroups around the process leave (v1 or v2; page cache
    is given back when it is needed, so it does not count as taken), and RLIMIT_AS.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    limits = [Limit(psutil.virtual_memory().available, ""), *_cgroup_limits(root)]
    address_space = _address_space()
    if address_space is not None:
        limits.append(address_space)
    return min(limits, key=lambda limit: limit.bytes)


def _address_space() -> Limit | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    return Limit(max(0, soft - psutil.Process().memory_info().vms), "left of RLIMIT_AS, see ulimit -v")


def _cgroup_limits(root: Path) -> Iterator[Limit]:
    """Of the process's memory cgroup and of all those around it, as far as they are visible here."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # Inside a container the path may be the host's, of which only the mount itself is visible.
        for place in (inside, *inside.parents) if path.strip("/") else (inside,):
            found = _limit_of(mount / place, *files)
            if found is not None:
                yield found


def _limit_of(folder: Path, most: str, used: str, prefix: str) -> Limit | None:
    with suppress(OSError, ValueError):
        limit = int((folder / most).read_text())  # v2 says "max" for none
        if limit >= _UNLIMITED:
            return None
        left = limit - int((folder / used).read_text()) + _page_cache(folder / "memory.stat", prefix)
        return Limit(max(0, min(left, limit)), f"of {limit / GIB:.1f} that the memory cgroup of this process allows")
    return None


def _page_cache(stat: Path, prefix: str) -> int:
    kinds = {f"{prefix}inactive_file", f"{prefix}active_file"}
    with suppress(OSError, ValueError):
        fields = (line.split() for line in stat.read_text().splitlines())
        return sum(int(field[1]) for field in fields if field[0] in kinds)
    return 0


def device_limit(device: torch.device | str) -> Limit | None:
    """What can still be allocated on a device; ``None`` for a CPU, whose memory is the host's."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    # What PyTorch has taken and does not use now is there for the taking.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Limit(free, f"of the {total / GIB:.1f} GiB of {torch.cuda.get_device_name(device)}")


def require_host_memory(needed: int, config: MeftConfig, layers: int, *, copies: int = 0) -> None:
    """Refuse what does not fit: ``needed`` bytes for rows and ``copies`` of them during saves.

    Raises:
        MeftConfigError: with the bytes needed, the bytes available and the number of rows that would fit.
    """
    limit = host_limit()
    if needed + copies > limit.bytes:
        fitting = config.adapter.rows * max(0, limit.bytes - copies) // needed
        besides = f" besides {copies / GIB:.1f} GiB for checkpoint.snapshot_bytes" if copies else ""
        raise MeftConfigError(
            f"adapter.rows = {config.adapter.rows} in {layers} layers needs {needed / GIB:.1f} GiB of host memory"
            f"{besides}, and {limit}; at most about {fitting} rows would fit"
        )


def require_device_memory(needed: dict[str, int], config: MeftConfig, layers: int, device: torch.device | str) -> None:
    """Refuse what cannot fit on the device whatever a micro-batch holds.

    Args:
        needed: bytes that are yet to be allocated there, by kind, with a micro-batch of one token.

    Raises:
        MeftConfigError: with the bytes needed, by kind, and the bytes available.
    """
    limit, total = device_limit(device), sum(needed.values())
    if limit is None or total <= limit.bytes:
        return
    kinds = ", ".join(f"{kind.replace('_', ' ')} {count / GIB:.1f}" for kind, count in needed.items() if count)
    raise MeftConfigError(
        f"adapter.rows = {config.adapter.rows} in {layers} layers needs {total / GIB:.1f} GiB of device memory before "
        f'any activation ({kinds}), and {limit}; use fewer rows, or offload.keys_dtype = "int8", or offload.keys = '
        '"host"'
    )
