"""A sweep as a job array of a real Slurm: two runs have to make room, the sweep is killed, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.cluster.lab import ROOT, require, start_lab
from tests.cluster.slurm import PROGRAMS, Slurm, start_slurm
from tests.integration.engines import differing
from tests.sweep_materials import content, steps_logged, write_materials, write_sweep

pytest.importorskip("submitit")
pytestmark = pytest.mark.cluster

SWEEP = [sys.executable, str(ROOT / "launch" / "sweep.py")]
STEPS = 150
GRID = {"meft.adapter.rows": [35, 40, 45], "arguments.learning_rate": [0.01, 0.003]}
BY_SIGNAL, BY_REQUEUE = 0, 1
"""The runs that have to make room, by SIGUSR1 and by ``scontrol requeue``."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require(*PROGRAMS)
    with start_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield start_slurm(lab, tmp_path_factory.mktemp("slurm"))


def until(what: str, condition: Callable[[], Any], process: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    """Wait for something that has to happen while a sweep runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the sweep ended before {what}: {log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"{what} did not happen: {log.read_text()[-3000:]}"
        time.sleep(0.2)


def state(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {"state": "waiting", "job": "", "attempts": 0}


def kill_hard(process: subprocess.Popen) -> None:
    """It and what it entered the host with."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


@pytest.fixture(scope="module")
def swept(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of six runs that was disturbed in every way."""
    place = tmp_path_factory.mktemp("sweep")
    write_materials(place)
    # No checkpoint but those that are asked for by a signal.
    arguments = {"max_steps": STEPS, "save_strategy": "no"}
    resources = {"gpus": 0, "slurm": {"time": 8, "parallel": 2, "partition": "all"}}
    file = write_sweep(place / "sweep.yaml", content(place, arguments, grid=GRID, resources=resources))
    output, log = place / "out put", place / "sweep.log"
    command = [*SWEEP, str(file), "--output", str(output), "--slurm"]
    first = slurm.login.start(command, place, log, slurm.environment)
    runs: list[Path] = []
    sent: list[subprocess.Popen] = []

    def disturb(index: int, *orders: str) -> None:
        until("a few steps", lambda: steps_logged(runs[index] / "log.txt") >= 3, first, log)
        # Not waited for: scancel goes on asking until it hears of a job that has gone.
        order = [*orders, state(runs[index])["job"]]
        sent.append(slurm.login.start(order, place, place / f"{orders[0]}.log", slurm.environment))

    try:
        until("the runs were made", lambda: len(list(output.glob("00*/status.json"))) == 6, first, log)
        runs += sorted(output.glob("00*"))
        disturb(BY_SIGNAL, "scancel", "--signal=USR1")
        disturb(BY_REQUEUE, "scontrol", "requeue")
        until("a run was interrupted", lambda: state(runs[BY_SIGNAL])["state"] == "interrupted", first, log)
    finally:
        for process in (first, *sent):
            kill_hard(process)
    again = slurm.login.start(command, place, place / "again.log", slurm.environment)
    try:
        assert again.wait(timeout=900) == 0, (place / "again.log").read_text()[-4000:]
    finally:
        kill_hard(again)
    return place


def test_every_run_finishes_and_only_those_that_made_room_began_twice(swept: Path) -> None:
    found = [state(folder) for folder in sorted((swept / "out put").glob("00*"))]
    assert [run["state"] for run in found] == ["finished"] * 6
    assert [run["attempts"] for run in found] == [2, 2, 1, 1, 1, 1]


def test_a_sweep_that_was_killed_comes_back_to_its_jobs(swept: Path) -> None:
    assert "submitted 6 runs" in (swept / "sweep.log").read_text()
    assert "submitted" not in (swept / "again.log").read_text()
    assert len({state(folder)["job"].partition("_")[0] for folder in (swept / "out put").glob("00*")}) == 1
    assert len((swept / "out put" / "results.csv").read_text().splitlines()) == 7
    assert (swept / "out put" / "results.svg").is_file() and (swept / "out put" / "results.png").is_file()


def test_runs_that_made_room_lost_no_step(swept: Path) -> None:
    for index in (BY_SIGNAL, BY_REQUEUE):
        (folder,) = (swept / "out put").glob(f"{index:03d}-*")
        (checkpoint,) = folder.glob("checkpoint-*")
        assert 3 <= int(checkpoint.name.partition("-")[2]) < STEPS
        # No step was trained twice, and none was left out.
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
        assert steps_logged(folder / "log.txt") == STEPS


def test_the_result_is_that_of_an_undisturbed_run(swept: Path, slurm: Slurm) -> None:
    """Bit for bit."""
    grid = {"meft.adapter.rows": [35], "arguments.learning_rate": [0.01, 0.003]}
    values = content(swept, {"max_steps": STEPS, "save_strategy": "no"}, grid=grid)
    file = write_sweep(swept / "calm.yaml", values)
    slurm.run([*SWEEP, str(file), "--output", str(swept / "calm")], swept)
    for index in (BY_SIGNAL, BY_REQUEUE):
        one, other = (next((swept / name).glob(f"{index:03d}-*")) for name in ("out put", "calm"))
        assert one.name == other.name
        adapters = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
        assert differing(*adapters) == []
        losses = [
            [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"][:-1]]
            for folder in (one, other)
        ]
        assert losses[0] == losses[1]


def test_a_run_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    """DeepSpeed's launcher on each of them, without ssh; the run by itself is no array."""
    write_materials(tmp_path)
    evaluate = {"data": str(tmp_path / "train.jsonl"), "arguments": {"max_new_tokens": 2}}
    resources = {"gpus": 0, "nodes": 2, "slurm": {"time": 8}}
    file = write_sweep(tmp_path / "sweep.yaml", content(tmp_path, resources=resources, evaluate=evaluate))
    slurm.run([*SWEEP, str(file), "--output", str(tmp_path / "out"), "--slurm"], tmp_path)
    folder = tmp_path / "out" / "000-run"
    found = state(folder)
    assert found["state"] == "finished" and found["evaluation"]["train"]["count"] == 24
    # 24 examples in batches of 4 are six steps an epoch for one rank, and three for two.
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["epoch"] for entry in history if "loss" in entry][2] == pytest.approx(1.0)
    assert "--node_rank" in (folder / "log.node1.txt").read_text()
