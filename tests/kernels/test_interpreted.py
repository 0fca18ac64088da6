"""A few of the interpreted tests, in a process that was started for them; `make test-kernels` runs all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTERPRETED = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
FEW = [
    *(f"test_adapter.py::test_selection_and_output[{case}-1-33-5-7-2-6]" for case in ("sigmoid-7-ties", "none-1-nan")),
    "test_adapter.py::test_gradients[softmax-None-True-random-1-33-5-7-2-6]",
    "test_adapter.py::test_nan_experts_come_last_and_infinite_ones_before_them",
    "test_gather.py::test_against_a_model[17-dtype1-24-True-True]",
    "test_adam.py::test_bits[0-57-moments1-True]",
]


def test_a_few():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"interpreted/{name}" for name in FEW)]
    done = subprocess.run(command, cwd=HERE, env=INTERPRETED, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"{len(FEW)} passed" in done.stdout, done.stdout + done.stderr
