"""Whether the kernels are right on a card: their tests, and the same under NVIDIA's compute-sanitizer.

Two stages of ``gpu.py``, ``gpu_checks.py correctness`` and ``gpu_checks.py sanitizer``: each prints one JSON object at
the end.
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
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = "tests/gpu/test_kernels_on_gpu.py"
# A whole layer, and what no layer calls: rows and gradients in place in the host's memory, and the update of rows.
FEW_ON_GPU = (
    "test_a_small_layer_is_what_pytorch_finds",
    "test_against_a_model[17-dtype1-24-True]",
    "test_gradients_return_to_the_host[11-33]",
    "test_bits[0-57-moments1-True]",
)
FEW_INTERPRETED = (
    "tests/kernels/interpreted/test_rows.py::test_expert_lists_are_complete_and_in_order",
    "tests/kernels/interpreted/test_rows.py::test_what_is_not_fresh_may_be_anything",
    "tests/kernels/interpreted/test_adapter.py::test_nan_experts_come_last_and_infinite_ones_before_them",
)
TOOLS = ("memcheck", "racecheck", "synccheck")
TOOL_SECONDS = 180
_CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def correctness(tiny: bool) -> dict[str, Any]:
    """How many tests of the kernels have passed, failed and been skipped; ``tiny``: of a few interpreted ones.

    Raises:
        RuntimeError: where none could be run.
    """
    tests, workers = (FEW_INTERPRETED, 1) if tiny else ((ON_GPU,), min(8, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if workers > 1 and importlib.util.find_spec("xdist"):
            options += ["-n", str(workers), "--dist", "worksteal"]  # most of the time goes into compiling, on the host
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, text=True, **_CAPTURED)
        print(done.stdout.strip())
        if not report.exists():
            raise RuntimeError(f"the tests did not run: {done.stdout.strip().splitlines()[-1:]}")
        counts = counted(report.read_text(encoding="utf-8"))
    if not counts["passed"] + counts["failed"]:
        raise RuntimeError(f"all {counts['skipped']} tests were skipped")
    return counts


def counted(report: str) -> dict[str, int]:
    """Tests that have passed, failed (errors are failures) and been skipped, of a report in JUnit's XML."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("tests", "failures", "errors", "skipped")
    )
    return {
        "passed": total - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
    }


def sanitizer(tiny: bool) -> dict[str, Any]:
    """What each tool of compute-sanitizer finds in a few tests: a number of errors, or why there is none."""
    binary = compute_sanitizer()
    if tiny or not torch.cuda.is_available() or binary is None:
        reason = "compute-sanitizer is not installed" if binary is None else "it needs a GPU"
        print(f"not run: {reason}")
        return dict.fromkeys(TOOLS, f"not run: {reason}")
    found = {}
    for tool in TOOLS:
        found[tool] = checked(binary, tool, [f"{ON_GPU}::{name}" for name in FEW_ON_GPU])
        print(f"{tool}: {found[tool]}", flush=True)
    return found


def compute_sanitizer() -> str | None:
    """Its path, from PATH or beside the CUDA compiler; ``None`` where it is not installed."""
    beside = Path(CUDA_HOME or "", "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(beside))


def checked(binary: str, tool: str, tests: Sequence[str]) -> int | str:
    """The errors that a tool counts in these tests; a sentence where it could not say."""
    command = [binary, "--tool", tool, "--target-processes", "application-only", "--print-limit", "20"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # Each tensor in memory of its own, so that what is beyond its end belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=TOOL_SECONDS, **_CAPTURED)
    except subprocess.TimeoutExpired:
        return f"not done after {TOOL_SECONDS} s"
    return summarised(done.stdout)


def summarised(output: str) -> int | str:
    """The number of errors in the summary that a tool ends with, of tests that have passed."""
    said = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    passed = re.search(r"^\d+ passed", output, re.MULTILINE)
    if said is None or (passed is None and not int(said[1])):
        lines = [line for line in output.splitlines() if line.strip()]
        return f"no summary: {lines[-1]}" if lines else "no summary"
    return int(said[1])


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["correctness", "sanitizer"])
    parser.add_argument("--tiny", action="store_true", help="without a card: a few interpreted tests, no sanitizer")
    arguments = parser.parse_args()
    try:
        found = {"correctness": correctness, "sanitizer": sanitizer}[arguments.stage](arguments.tiny)
    except RuntimeError as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
