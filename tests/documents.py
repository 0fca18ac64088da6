"""The documents, and the commands that they tell their readers to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(
        path
        for folder in ("docs", "ds_configs", "launch", "benchmarks")
        for path in sorted(ROOT.glob(f"{folder}/**/*.md"))
    ),
]

ELSEWHERE = {
    "srun": ("of Slurm, which the tests start themselves", "tests/cluster/test_slurm.py"),
    "sbatch": ("of Slurm, which the tests start themselves", "tests/cluster/test_batch_scripts.py"),
    "mpirun": ("of Open MPI", "tests/cluster/test_open_mpi.py"),
    "kubectl": (
        "of Kubernetes, for a manifest that its schema allows",
        "tests/unit/test_jobset.py",
    ),
}
"""Programs that are not started as they are written: why, and the tests of what they start."""


def commands() -> Iterator[tuple[str, str]]:
    """Where each command stands, and the command as one line, without remarks."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if shlex.split(line, comments=True):
                    yield str(path.relative_to(ROOT)), " ".join(re.sub(r"\s#\s.*", "", line).split())


def without_ellipses(command: str) -> str:
    """Without the … that stands for options of the reader's own."""
    return re.sub(r"(?<=\s)…(?=\s|$)", "", command)
