"""A sweep through DeepSpeed's launcher, evaluation included."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process_groups import without_ranks
from tests.sweep_materials import content, write_materials, write_sweep

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``launch/sweep.py`` as a user starts it, in ``folder``."""
    environment = {**without_ranks(os.environ), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def test_two_runs_train_are_asked_and_are_compared(tmp_path: Path) -> None:
    write_materials(tmp_path)
    evaluate = {"data": str(tmp_path / "train.jsonl"), "arguments": {"max_new_tokens": 4}}
    grid = {"meft.adapter.rows": [35, 70]}
    file = write_sweep(tmp_path / "sweep.yaml", content(tmp_path, grid=grid, evaluate=evaluate))
    done = sweep(tmp_path, str(file), "--output", "out")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    with (tmp_path / "out" / "results.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(row["run"], row["state"]) for row in rows] == [("000-rows35", "finished"), ("001-rows70", "finished")]
    for row in rows:
        folder = tmp_path / "out" / row["run"]
        report = json.loads((folder / "train_report.json").read_text())
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert report["rows"] == int(row["meft.adapter.rows"]) and float(row["host_bytes"]) == report["host_bytes"]
        assert float(row["touched_share"]) == report["touched_share"]
        assert float(row["final_loss"]) == next(entry["loss"] for entry in reversed(history) if "loss" in entry)
        last = json.loads((folder / "evaluate.log").read_text().splitlines()[-1])
        assert float(row["exact_match"]) == last["train"]["exact_match"]
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert len(answers) == last["train"]["count"]
        assert sum(answer["correct"] for answer in answers) / len(answers) == last["train"]["exact_match"]
    (named,) = [line for line in done.stdout.splitlines() if line.startswith("side by side: ")]
    command = named.removeprefix("side by side: ").replace("meft-engine", f"{sys.executable} -m meft_engine", 1)
    shown = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and "2 runs" in shown.stdout, shown.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file()
