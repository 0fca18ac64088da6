"""The batch scripts of ``launch/slurm`` on a real Slurm: told to make room, ranks save, and the job goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import ROOT, require, start_lab
from tests.cluster.slurm import PROGRAMS, Slurm, start_slurm
from tests.sweep_materials import ARGUMENTS, steps_logged, write_materials

pytestmark = pytest.mark.cluster

STEPS = 120
SCRIPTS = {"single_node": ["--num_accelerators", "1"], "multi_node_srun": [], "multi_node_deepspeed": []}
"""What stands before the training script: options of DeepSpeed's launcher, on a machine without a GPU."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require(*PROGRAMS)
    with start_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield start_slurm(lab, tmp_path_factory.mktemp("slurm"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_that_is_told_to_make_room_saves_and_goes_on(name: str, slurm: Slurm, tmp_path: Path) -> None:
    write_materials(tmp_path)
    run = tmp_path / "run"
    values = {**ARGUMENTS, "max_steps": STEPS, "save_strategy": "no", "use_cpu": True, "output_dir": run}
    values |= {"resume_from_checkpoint": "auto", "deepspeed": tmp_path / "ds.json"}
    values |= {"model_name_or_path": tmp_path / "model", "train_file": tmp_path / "train.jsonl"}
    options = [f"--{key}={value}" for key, value in values.items()]
    here = ["--gpus-per-node=0", "--ntasks-per-node=1", "--time=8", f"--output={tmp_path}/job.out", "--parsable"]
    batch = [*here, str(ROOT / "launch" / "slurm" / f"{name}.sbatch"), *SCRIPTS[name]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{slurm.environment['PATH']}"
    submit = ["env", f"PATH={path}", "sbatch", *batch, str(ROOT / "launch" / "finetune.py"), *options]
    slurm.run(submit, tmp_path)
    job, log = (tmp_path / "env.log").read_text().strip(), tmp_path / "job.out"

    def printed() -> str:
        return log.read_bytes().decode("utf-8", "replace") if log.exists() else ""

    def until(what: str, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 400
        while not found():
            assert time.monotonic() < end, f"{what}: {printed()[-4000:]}"
            time.sleep(0.2)

    until("a few steps", lambda: steps_logged(log) >= 3)
    slurm.run(["scancel", "--batch", "--signal=USR1", job], tmp_path)
    until("the job to end", (run / "train_report.json").is_file)
    (checkpoint,) = run.glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.partition("-")[2]) < STEPS
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
    assert STEPS - 3 <= steps_logged(log) <= STEPS, "no step was trained twice"
    assert "stopped after step" in printed()
    until("the job to leave", lambda: job not in slurm.run(["squeue", "--noheader", "--format=%i"], tmp_path).split())
