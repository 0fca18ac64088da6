"""What this machine is, in a few lines that stand beside the figures measured on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from meft_engine.cores import rank_cores
from meft_kernels.cpu import build

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache() -> int | None:
    """Bytes of the largest cache of a core; ``None`` where the system does not say."""
    return max((size for _, size in _caches()), default=None)


def describe(threads: int) -> list[str]:
    """One line for each thing worth knowing, with no name of a machine, user or folder in it."""
    caches = ", ".join(f"{name} {size >> 10:,} KiB" for name, size in _caches()) or "unknown"
    passes = "compiled for this machine" if build.library() is not None else "PyTorch (could not be compiled)"
    return [
        f"CPU: {_cpu_model()}{', virtual machine' if _virtual() else ''}",
        f"cores: {len(rank_cores())} usable, {threads} threads used",
        f"caches of a core: {caches}",
        f"memory: {psutil.virtual_memory().total / 2**30:.1f} GiB, huge pages: {_huge_pages()}",
        f"kernel: {platform.system()} {platform.release()} ({platform.machine()})",
        f"compiler: {_compiler()}",
        f"row kernels: {passes}",
        f"python {platform.python_version()}, torch {torch.__version__}, deepspeed {_version('deepspeed')}",
    ]


def footnote(threads: int) -> str:
    """The same for the foot of a plot."""
    cache = last_level_cache()
    size = f", {cache / 2**20:.0f} MiB last-level cache" if cache else ""
    versions = f"torch {torch.__version__}, deepspeed {_version('deepspeed')}"
    return f"{_cpu_model()}{' (virtual machine)' if _virtual() else ''}, {threads} threads{size}; {versions}"


def _caches() -> list[tuple[str, int]]:
    found = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found.append((f"L{level}{suffix}", int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)))
    return found


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _virtual() -> bool:
    return "hypervisor" in _cpuinfo("flags").split()


def _huge_pages() -> str:
    try:
        choices = _HUGE_PAGES.read_text()
    except OSError:
        return "unknown"
    return choices.partition("[")[2].partition("]")[0] or choices.strip()


def _compiler() -> str:
    if shutil.which("g++") is None:
        return "no g++"
    return subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
