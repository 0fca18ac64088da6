"""Compiles every kernel for every target and writes what it takes: ``python -m tests.kernels.compiled.resources FILE``.

Ends with 1, naming each, where a kernel spills, has no room in shared memory, or lacks the instructions it is meant to
have.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from pathlib import Path

import triton
from tqdm import tqdm

from tests.kernels.compiled.ahead_of_time import SHARED_LIMITS, TARGETS, Resources, compiled, launches_of
from tests.kernels.compiled.launches import EXPERTS, PER_TOKEN, ROWS, TOP_K, D, T, calls

MARK = "<!-- Written by `make test-kernels`. -->\n"
ON_TENSOR_CORES = ("route", "score")


def measured(name: str, target: str) -> dict[str, Resources]:
    """What each launch of a call takes on a target, by kernels' names; the call's own has the call's name."""
    found: dict[str, Resources] = {}
    for launch in launches_of(calls()[name], target):
        # A call may launch what others launch, too, and one kernel twice.
        kernel = name if name.split("/")[0] == launch.name else launch.name
        found[kernel if kernel not in found else f"{kernel}, again"] = compiled(launch, target)
    return found


def faults(kernel: str, target: str, took: Resources) -> list[str]:
    """What is wrong with it, in sentences."""
    found, name = [], f"{kernel} on {target}"
    if took.spilled:
        found.append(f"{name} spills {took.spilled} bytes")
    if took.shared > SHARED_LIMITS[target]:
        found.append(f"{name} wants {took.shared} bytes of shared memory of {SHARED_LIMITS[target]}")
    multiplies = kernel.split("/")[0] in ON_TENSOR_CORES
    if multiplies != (took.tensor_cores > 0):
        found.append(f"{name} has {took.tensor_cores} instructions for tensor cores")
    # AMD's GPUs have no such instructions.
    if multiplies and not took.asynchronous_copies and target != "gfx942":
        found.append(f"{name} copies nothing asynchronously")
    return found


def table(found: dict[str, dict[str, Resources]]) -> str:
    """In Markdown: registers of a thread, and KiB of shared memory."""
    lines = [
        f"T = {T} tokens, d = {D}, {ROWS:,} rows in {EXPERTS} experts, n = {PER_TOKEN}, K = {TOP_K}; Triton "
        f"{triton.__version__}. Registers of a thread / KiB of shared memory of a program; none spills.",
        "",
        f"| kernel | {' | '.join(TARGETS)} |",
        "|---|" + "--:|" * len(TARGETS),
    ]
    for kernel, by_target in found.items():
        cells = [f"{by_target[target].registers} / {by_target[target].shared / 1024:.1f}" for target in TARGETS]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(path: Path) -> int:
    """See the top of this file."""
    pairs = list(itertools.product(calls(), TARGETS))
    found: dict[str, dict[str, Resources]] = {}
    # Not by forking: the compiler behind Triton has threads.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        jobs = [pool.apply_async(measured, pair) for pair in pairs]
        for (_, target), job in zip(tqdm(pairs, unit="kernel", desc="compiling"), jobs, strict=True):
            for kernel, took in job.get().items():
                found.setdefault(kernel, {})[target] = took
    wrong = [
        fault for kernel, by in found.items() for target, took in by.items() for fault in faults(kernel, target, took)
    ]
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    before, _, _ = path.read_text(encoding="utf-8").partition(MARK)
    path.write_text(before + MARK + table(found), encoding="utf-8")
    print(f"{len(found)} kernels and variants compile for {len(TARGETS)} targets without a spill; see {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
