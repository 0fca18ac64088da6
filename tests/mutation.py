"""Breaks code in ways that matter, one at a time, and says which of them its tests notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """What is replaced in a file, and which tests could notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""
    """Why nothing can notice it, if that is so."""


def mutated(mutant: Mutant) -> str:
    """The file with the mutant in it.

    Raises:
        ValueError: if what it replaces is not there, so that the mutant would change nothing.
    """
    text = Path(ROOT, mutant.file).read_text(encoding="utf-8")
    if mutant.old not in text:
        raise ValueError(f"{mutant.name}: {mutant.file} has changed, and does not contain {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def caught(mutant: Mutant, environment: dict[str, str]) -> bool:
    """Whether a test fails, or its process dies, over a copy of the project with this mutant in it."""
    with tempfile.TemporaryDirectory() as work:
        skipped = shutil.ignore_patterns("__pycache__", "assets")
        for package, name in (("kernels", "meft_kernels"), ("meft_engine", "meft_engine"), ("tests", "tests")):
            shutil.copytree(ROOT / package, Path(work, name), ignore=skipped)
        shutil.copy(ROOT / "setup.cfg", work)
        Path(work, mutant.file.replace("kernels/", "meft_kernels/", 1)).write_text(mutated(mutant), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": work, "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        code = subprocess.run(command, env=environment, cwd=work, capture_output=True).returncode
        # Who reads or writes out of bounds may die of it: of a signal, of which codes are negative.
        assert code <= 1, f"{mutant.name}: pytest ended with {code}, so its tests did not run"
        return code != 0


def report(mutants: Sequence[Mutant], environment: dict[str, str]) -> bool:
    """Try all of them and print those that survive, and one JSON object at the end.

    Args:
        environment: for the tests, besides this process's.

    Returns:
        Whether none survives but those that say why.
    """
    outcomes = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(lambda one: caught(one, environment), mutants), total=len(mutants), unit="mutant")
        for mutant, noticed in zip(mutants, progress, strict=True):
            outcomes.append(noticed)
            if not noticed:
                reason = mutant.survives or "nobody knows why"
                progress.write(f"survives: {mutant.name} ({mutant.file}): {reason}", file=sys.stdout)
    share = round(sum(outcomes) / len(mutants), 4)
    print(json.dumps({"mutants": len(mutants), "caught": sum(outcomes), "share": share}))
    return all(noticed or mutant.survives for mutant, noticed in zip(mutants, outcomes, strict=True))
