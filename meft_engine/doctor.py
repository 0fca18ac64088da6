"""What this machine has and lacks for a run: one line each, and what to do about it.

Exit code 0: no problem (warnings may be); 1: a problem.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

GIB = 1 << 30
OK, WARNING, PROBLEM = "ok", "warning", "problem"
_STALE_LOCK = 600.0  # seconds; the longest of DeepSpeed's own compilations takes a few minutes
_DISTRIBUTION = "meft-engine"


@dataclass(frozen=True)
class Finding:
    """One line."""

    topic: str
    state: str
    """``ok``, ``warning`` or ``problem``."""
    found: str
    remedy: str = ""
    """A sentence, where something is to be done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no_build", action="store_true", help="do not compile the row kernels to see whether they do")


def run(arguments: argparse.Namespace) -> int:
    """Look, and print what was found."""
    findings, report = list(examine(build=not arguments.no_build)), ds_report()
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "ds_report": report}))
    else:
        _show(findings, report)
    return 1 if any(finding.state == PROBLEM for finding in findings) else 0


def examine(*, build: bool = True) -> Iterator[Finding]:
    """All findings, in the order in which a run would meet them. What cannot be looked at is said, never raised.

    Args:
        build: compile the row kernels, where they have not been.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        packages,
        tools,
        stale_locks,
        lambda: row_kernels(build),
        deepspeed_operators,
        cpu,
        gpu,
        memory,
        shared_memory,
        numa,
        huge_pages,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a doctor that falls ill helps nobody
            name = getattr(check, "__name__", "row_kernels")
            yield Finding(name.replace("_", " "), WARNING, f"could not be looked at ({type(error).__name__}: {error})")


def packages() -> Iterator[Finding]:
    """Versions of what the project asks for, with the extras that are installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", PROBLEM, f"{_DISTRIBUTION} is not installed", "Install it with pip install -e .")
        return
    yield Finding("python", OK, ".".join(map(str, sys.version_info[:3])))
    seen = set()
    for requirement in map(Requirement, lines):
        extras = re.findall(r"extra == ['\"](\w+)['\"]", str(requirement.marker)) if requirement.marker else []
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": (extras or [""])[0]}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not extras:
                remedy = f"Install it with pip install '{requirement.name}{requirement.specifier}'."
                yield Finding(requirement.name, PROBLEM, "is not installed", remedy)
            continue
        if requirement.name in seen:
            continue
        seen.add(requirement.name)
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, OK, version)
        else:
            remedy = f"Install it with pip install '{requirement.name}{requirement.specifier}'."
            yield Finding(requirement.name, PROBLEM, f"{version}, and {requirement.specifier} is needed", remedy)


def tools() -> Iterator[Finding]:
    """What operators are compiled with."""
    compiler = os.environ.get("CXX", "g++")
    for tool, state, remedy in (
        (compiler, WARNING, "Install g++ (apt-get install g++); without it rows are updated by PyTorch, more slowly."),
        ("ninja", WARNING, "Put the folder of the environment's ninja on PATH, or pip install ninja."),
    ):
        path = shutil.which(tool)
        yield Finding(tool, OK, _first_line([tool, "--version"])) if path else Finding(tool, state, "not found", remedy)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc:
        yield Finding("nvcc", OK, _last_line([nvcc, "--version"]))
    elif _has_gpu():
        remedy = "Install CUDA's toolkit and set CUDA_HOME, or keep torch_adam = true in the JSON's optimizer."
        yield Finding("nvcc", WARNING, "not found, so DeepSpeed compiles no operators for the GPU", remedy)
    else:
        yield Finding("nvcc", OK, "not found, and there is no GPU to compile for")


def extensions_folder() -> Path:
    """Where torch keeps what it has compiled at run time."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def stale_locks() -> Iterator[Finding]:
    """A compilation that was cut off leaves a file ``lock``, for which torch waits for as long as it takes."""
    folder = extensions_folder()
    locks = [path for path in folder.rglob("lock") if path.is_file()] if folder.is_dir() else []
    for lock in locks:
        age = time.time() - lock.stat().st_mtime
        if age > _STALE_LOCK:
            yield Finding(
                "compilation lock",
                PROBLEM,
                f"{lock} is {age / 60:.0f} minutes old, and whoever needs {lock.parent.name} waits for it forever",
                f"If nothing is being compiled, remove it: rm {lock}",
            )
        else:
            yield Finding(
                "compilation lock",
                WARNING,
                f"{lock} is {age:.0f} seconds old; {lock.parent.name} is being compiled, or was cut off just now",
                "Look again in ten minutes.",
            )
    if not locks:
        yield Finding("compilation locks", OK, f"none in {folder}")


def row_kernels(build: bool) -> Iterator[Finding]:
    """Our passes over rows and tokens on a CPU."""
    from meft_kernels.cpu import build as kernels

    if any(finding.state == PROBLEM for finding in stale_locks() if "meft_" in finding.found):
        yield Finding("row kernels", WARNING, "not tried, a lock is in the way", "Remove the lock that is named above.")
    elif not build:
        yield Finding("row kernels", OK, "not tried (--no_build)")
    elif kernels.library() is not None:
        yield Finding("row kernels", OK, "compiled and loaded")
    else:
        remedy = "See the warning above; a C++17 compiler with OpenMP is needed, such as g++ (apt-get install g++)."
        yield Finding("row kernels", WARNING, "could not be compiled; PyTorch takes their place, more slowly", remedy)


def deepspeed_operators() -> Iterator[Finding]:
    """Which of DeepSpeed's operators could be compiled here, by its own account."""
    _import_deepspeed()
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    found = {name: _quietly(builder.is_compatible) for name, builder in ALL_OPS.items()}
    able = sorted(name for name, compatible in found.items() if compatible)
    yield Finding("DeepSpeed's operators", OK, f"{len(able)} of {len(found)} can be compiled: {', '.join(able)}")
    if not found.get("cpu_adam"):
        remedy = "Install g++ and ninja, or set torch_adam = true in the params of the JSON's optimizer."
        yield Finding("DeepSpeedCPUAdam", WARNING, "cannot be compiled, which offload_optimizer needs", remedy)


def cpu() -> Iterator[Finding]:
    """What its passes and products can use."""
    import torch

    flags = _cpu_flags()
    named = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
    named |= {"asimd": "NEON", "sve": "SVE", "bf16": "bf16"}
    has = [name for flag, name in named.items() if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {torch.get_num_threads()} threads of torch, {', '.join(has) or 'no vector extension known'}"
    if not flags & {"avx2", "asimd"} and flags:
        yield Finding("CPU", WARNING, text, "Updates of rows will be slow; use a machine with AVX2 or NEON.")
    elif not flags & {"avx512_bf16", "amx_bf16", "bf16"} and not _has_gpu():
        yield Finding("CPU", WARNING, f"{text}; bf16 is emulated", "Train in fp32 on this machine, not in bf16.")
    else:
        yield Finding("CPU", OK, text)


def gpu() -> Iterator[Finding]:
    """Cards and Triton."""
    import torch

    if not _has_gpu():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            remedy = "Install a build of torch for CUDA (https://pytorch.org/get-started/locally)."
            yield Finding("GPU", PROBLEM, f"there is a driver, but torch {torch.__version__} is built for CPUs", remedy)
        elif driver:
            remedy = "Run nvidia-smi; the driver may be older than torch's CUDA, or the container has no GPU."
            yield Finding("GPU", PROBLEM, f"there is a driver, but torch {torch.__version__} sees no card", remedy)
        else:
            yield Finding("GPU", OK, "none; models compute on the CPU")
    for index in range(torch.cuda.device_count() if _has_gpu() else 0):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, sm_{major}{minor}"
        old = major < 8
        yield Finding(f"GPU {index}", WARNING if old else OK, text, "It has no bf16; use fp16." if old else "")
    if importlib.util.find_spec("triton") is None:
        state = WARNING if _has_gpu() else OK
        yield Finding(
            "Triton", state, "not installed", "Install it with pip install 'triton>=3.6'." if _has_gpu() else ""
        )
    elif _has_gpu():
        from meft_kernels.dispatch import token_passes

        passes = token_passes(torch.device("cuda"))
        ours = "triton" in getattr(passes, "__name__", type(passes).__module__)
        remedy = "" if ours else "See the log of a run for why; MEFT_TOKEN_PASSES chooses."
        yield Finding("Triton", OK if ours else WARNING, "its kernels are used" if ours else "PyTorch is used", remedy)
    else:
        yield Finding("Triton", OK, f"{metadata.version('triton')}, not used without a GPU")


def memory() -> Iterator[Finding]:
    """What a process may take, and pin."""
    import psutil

    from meft_engine.planner import limits

    limit, machine = limits.host_limit(), psutil.virtual_memory()
    text = f"{limit}, of {machine.total / GIB:.1f} GiB in the machine"
    yield Finding("host memory", OK if not limit.source else WARNING, text, _raise_limit(limit.source))
    if not _has_gpu() or sys.platform == "win32":
        return
    import resource

    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or os.geteuid() == 0:
        yield Finding("pinned memory", OK, "unlimited")
    else:
        # CUDA registers memory through its driver, which most systems do not count; some do.
        remedy = "If a run says that memory could not be pinned: ulimit -l unlimited, or memlock in limits.conf."
        yield Finding("pinned memory", WARNING, f"ulimit -l allows {locked / GIB:.2f} GiB", remedy)


def _raise_limit(source: str) -> str:
    if "RLIMIT_AS" in source:
        return "Lift it with ulimit -v unlimited if it is not wanted; addresses that are never used count too."
    return "Give the container or job more memory if the plan asks for it." if source else ""


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, which data loaders and NCCL use; ranks share rows in memory that does not count against it."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("/dev/shm", WARNING, "is not there", "Mount a tmpfs there, which data loaders and NCCL use.")
        return
    usage = shutil.disk_usage(path)
    text = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    small = usage.free < GIB
    remedy = "Start the container with --shm-size=8g, or remove what dead runs have left there." if small else ""
    yield Finding("/dev/shm", WARNING if small else OK, text, remedy)


def numa() -> Iterator[Finding]:
    """Nodes, between which ranks divide cores."""
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        yield Finding("NUMA", OK, "one node")
        return
    text = f"{len(nodes)} nodes: " + "; ".join(f"{n.name[4:]}: {(n / 'cpulist').read_text().strip()}" for n in nodes)
    yield Finding("NUMA", OK, f"{text}; each rank takes cores of one node, see docs/ranks.md")


def huge_pages() -> Iterator[Finding]:
    """Transparent ones, which rows ask for."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.is_file():
        yield Finding("huge pages", OK, "the system has none; offload.huge_pages means nothing")
        return
    chosen = re.search(r"\[(\w+)\]", path.read_text())[1]
    remedy = f"echo madvise > {path} lets rows have them (as root)." if chosen == "never" else ""
    yield Finding("huge pages", WARNING if remedy else OK, chosen, remedy)


def ds_report() -> str:
    """What DeepSpeed's own ``ds_report`` prints; empty where it cannot run."""
    command = [sys.executable, "-c", "from deepspeed.env_report import cli_main; cli_main()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"ds_report could not run ({error})"
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout if done.returncode == 0 else done.stdout + done.stderr)
    return text.strip()


def _import_deepspeed() -> None:
    import logging

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_gpu() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # noqa: F401


def _quietly(is_compatible: Callable[..., bool]) -> bool:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return bool(is_compatible())
        except Exception:  # a builder that looks for what is not there
            return False


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _first_line(command: list[str]) -> str:
    return _lines(command)[0]


def _last_line(command: list[str]) -> str:
    return _lines(command)[-1]


def _lines(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"does not answer ({error})"]
    return (done.stdout or done.stderr).strip().splitlines() or ["says nothing"]


def _show(findings: list[Finding], report: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
    table = Table("", "", "found", box=None, pad_edge=False)
    for finding in findings:
        found = finding.found + (f"\n{finding.remedy}" if finding.remedy else "")
        table.add_row(f"[{colours[finding.state]}]{finding.state}[/]", escape(finding.topic), escape(found))
    console = Console(highlight=False)
    console.print(table)
    console.print("\n[bold]ds_report says:")
    console.print(report, markup=False)
    counts = {state: sum(f.state == state for f in findings) for state in (PROBLEM, WARNING)}
    console.print(f"\n{counts[PROBLEM]} problems, {counts[WARNING]} warnings")
