"""Runs of a sweep: to their end, to their failure, to a signal and on; by a script that plays the training."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import resuming
import sweep
import sweep_plan
import sweep_run
import sweep_slurm
from data import DataError
from sweep_file import Resources
from sweep_run import Limits, Stop, execute, read_status

from meft_engine.checkpoint import folders
from meft_engine.checkpoint.folders import Manifest
from tests.unit.sweep_fakes import played, write_fake

assert played  # a fixture

ODD = "a b 'c' \"d\" $(touch pwned) ; `touch pwned` \\ * é"
CPU = Resources(gpus=0)


def swept(folder: Path, arguments: dict[str, Any] | None = None, **sections: Any) -> tuple[int, Path]:
    path = write_fake(folder, arguments, **sections)
    return sweep.main([str(path), "--output", str(folder / "out")]), folder / "out"


def one_run(folder: Path, **arguments: Any) -> Path:
    """The folder of a run that has not started."""
    import sweep_file

    (run,) = sweep_plan.expand(sweep_file.read(write_fake(folder, arguments)))
    place = folder / "out" / "000-run"
    sweep_plan.make_folder(run, place)
    return place


def asks(stop: Stop, folder: Path, text: str, number: int = signal.SIGTERM) -> threading.Thread:
    """Ask to stop once the log says something."""

    def wait() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and text not in (folder / "log.txt").read_text():
            time.sleep(0.02)
        stop.received.append(number)

    (folder / "log.txt").touch()
    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_all_runs_end_in_one_table_and_one_plot(played: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, output = swept(tmp_path, grid={"meft.adapter.rows": [64, 128]})
    assert code == 0
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["meft.adapter.rows"] for row in rows] == ["64", "128"]
    assert {(row["state"], row["final_loss"], row["touched_share"], row["attempts"]) for row in rows} == {
        ("finished", "1.5", "0.2", "1")
    }
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        output / "results.svg"
    ).read_text()
    assert "finished" in capsys.readouterr().out
    # Nothing runs twice.
    assert swept(tmp_path, grid={"meft.adapter.rows": [64, 128]})[0] == 0
    assert [read_status(folder).attempts for folder in sorted(output.glob("00*"))] == [1, 1]


def test_a_run_that_is_finished_is_not_begun_again(played: None, tmp_path: Path) -> None:
    """As where Slurm starts a job once more."""
    folder = one_run(tmp_path, max_steps=2)
    first = execute(folder, CPU, Limits(), Stop())
    assert first.state == "finished" and execute(folder, CPU, Limits(), Stop()) == first == read_status(folder)


def test_one_that_fails_is_named_and_keeps_nobody(played: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, output = swept(tmp_path, list=[{"arguments.fail": 2}, {"arguments.fail": 99}])
    states = [read_status(folder).state for folder in sorted(output.glob("00*"))]
    assert code == 1 and states == ["failed", "finished"]
    printed = capsys.readouterr().out
    assert "the training ended with exit code 1" in printed and "it fails, as it was told to" in printed
    assert "1 of 2 runs are not finished" in printed
    assert swept(tmp_path, list=[{"arguments.fail": 2}, {"arguments.fail": 99}])[0] == 1
    assert [read_status(folder).attempts for folder in sorted(output.glob("00*"))] == [2, 1]


def test_values_reach_the_script_as_they_are(played: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"title": ODD, "dash": "-x", "nested": {"a": [1, "b c"]}, "flag": True, "nothing": None, "rate": 1e-5}
    code, output = swept(tmp_path, values)
    (folder,) = output.glob("000-*")
    line = next(line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("options "))
    got = json.loads(line.removeprefix("options "))
    assert code == 0 and got["title"] == ODD and got["dash"] == "-x" and json.loads(got["nested"]) == values["nested"]
    assert got["flag"] == "True" and "nothing" not in got and float(got["rate"]) == 1e-5
    assert not (tmp_path / "pwned").exists()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(played: None, tmp_path: Path) -> None:
    folder, stop = one_run(tmp_path, max_steps=60, pause=0.05), Stop()
    thread = asks(stop, folder, "step 3")
    status = execute(folder, CPU, Limits(), stop)
    thread.join()
    assert status.state == "interrupted" and status.attempts == 1 and read_status(folder) == status
    checkpoint = resuming.newest_whole(folder)
    assert checkpoint is not None
    status = execute(folder, CPU, Limits(), Stop())
    assert status.state == "finished" and status.attempts == 2
    steps = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert steps == [f"step {i}" for i in range(1, 61)], "no step is lost, and none is done twice"


def test_a_run_over_its_budget_saves_and_stops(played: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "_LOOK", 0.3)
    folder = one_run(tmp_path, max_steps=400, pause=0.05)
    status = execute(folder, CPU, Limits(run=1.0), Stop())
    assert status.state == "over budget" and "budget.hours_per_run" in status.reason
    assert resuming.newest_whole(folder) is not None
    again = execute(folder, CPU, Limits(run=1.0), Stop())
    assert again.state == "over budget" and "step 400" not in (folder / "log.txt").read_text()
    other = folder.with_name("001-other")
    sweep_plan.make_folder(sweep_plan.read_run(folder), other)
    assert "budget.hours_total" in execute(other, CPU, Limits(total=1.0), Stop()).reason


def test_a_node_ends_when_the_first_one_has(played: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ranks that never come."""
    monkeypatch.setattr(sweep_run, "_LOOK", 0.3)
    folder = one_run(tmp_path, max_steps=400, pause=0.05)
    ended = sweep_run.write_status(folder, sweep_run.Status(state="over budget", job="7"))
    started = time.monotonic()
    execute(folder, CPU, Limits(run=0.1), Stop(), sweep_run.Nodes(("n1", "n2"), 1, "7"))
    assert time.monotonic() - started < 15 and read_status(folder) == ended
    assert "step 400" not in (folder / "log.node1.txt").read_text()
    assert (folder / "hostfile.1").read_text() == "n1 slots=1\nn2 slots=1\n"


SWEEP_PROCESS = """
import sys, launcher, sweep
launcher.deepspeed_command = lambda *options: [sys.executable, {fake!r}, *options]
sys.exit(sweep.main(sys.argv[1:]))
"""


def start(folder: Path, path: Path) -> subprocess.Popen:
    from tests.unit.sweep_fakes import FAKE

    launch = Path(sweep.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(launch), str(launch.parent)])}
    command = [sys.executable, "-c", SWEEP_PROCESS.format(fake=str(FAKE)), str(path), "--output", str(folder / "out")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_logged(folder: Path, text: str) -> None:
    end = time.monotonic() + 60
    while not any(text in path.read_text() for path in folder.glob("out/000-*/log.txt")):
        assert time.monotonic() < end, f"{text!r} was not logged"
        time.sleep(0.02)


def test_a_killed_sweep_leaves_a_training_that_the_next_one_waits_for(played: None, tmp_path: Path) -> None:
    path = write_fake(tmp_path, {"pause": 0.05}, grid={"arguments.max_steps": [80, 2]})
    process = start(tmp_path, path)
    try:
        until_logged(tmp_path, "step 3")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert sweep.main([str(path), "--output", str(tmp_path / "out")]) == 0
    (folder,) = tmp_path.glob("out/000-*")
    steps = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert steps == [f"step {i}" for i in range(1, 81)], "one training, from its begin to its end"


def test_a_sweep_that_is_told_to_end_lets_its_run_save_and_keeps_others_out(tmp_path: Path, played: None) -> None:
    path = write_fake(tmp_path, {"pause": 0.05}, grid={"arguments.max_steps": [80, 2]})
    process = start(tmp_path, path)
    until_logged(tmp_path, "step 3")
    with pytest.raises(DataError, match="another sweep is at work"), sweep.alone_in(tmp_path / "out"):
        pass
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in printed and "2 of 2 runs are not finished" in printed
    assert sweep.main([str(path), "--output", str(tmp_path / "out")]) == 0
    assert read_status(next(tmp_path.glob("out/000-*"))).attempts == 2


def test_a_log_is_locked_as_long_as_a_process_of_the_training_lives(tmp_path: Path) -> None:
    with (tmp_path / "log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    with (tmp_path / "log").open("a") as mine:
        assert not sweep_run._locked(mine)
        child.communicate(b"\n")
        assert sweep_run._locked(mine)


# Checkpoints


def save(folder: Path, step: int, meft: bool = True) -> Path:
    """A checkpoint as the Trainer and the engine write it."""
    place = folder / f"checkpoint-{step}"
    inner = place / f"global_step{step}"
    (inner / "meft").mkdir(parents=True)
    (inner / "weights").write_text("x" * step)
    (place / "latest").write_text(inner.name)
    (place / "trainer_state.json").write_text("{}")
    if meft:
        Manifest(inner.name, step, {}, {"weights": folders.digest(inner / "weights")}).write(inner)
    else:
        (inner / "meft").rmdir()
    return place


def test_only_a_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert resuming.newest_whole(tmp_path) is None
    two, ten, nine = save(tmp_path, 2), save(tmp_path, 10), save(tmp_path, 9, meft=False)
    (tmp_path / "checkpoint-x").mkdir()
    assert resuming.newest_whole(tmp_path) == ten, "steps are numbers"
    (ten / "global_step10" / "weights").write_text("short")
    assert resuming.newest_whole(tmp_path) == nine
    (nine / "trainer_state.json").write_text('{"global_')
    assert resuming.newest_whole(tmp_path) == two
    (two / "global_step2" / "meft" / "manifest.json").unlink()
    assert resuming.newest_whole(tmp_path) is None


# Slurm


def test_what_goes_into_a_batch_script_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit_slurm = pytest.importorskip("submitit.slurm.slurm")
    monkeypatch.setenv("PYTHONPATH", ODD)
    resources = Resources.model_validate({"gpus": 2, "slurm": {"account": ODD, "time": "1:30:01", "mem": "8G"}})
    values = sweep_slurm.parameters(resources, f"sweep-{ODD}")
    script = submitit_slurm._make_sbatch_string(command="true", folder=tmp_path / ODD, map_count=3, **values)
    directives = dict(
        shlex.split(line.removeprefix("#SBATCH "))[0].removeprefix("--").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    assert directives["account"] == ODD and directives["job-name"] == f"sweep-{ODD}" and directives["time"] == "91"
    assert "requeue" in directives and directives["gpus-per-node"] == "2" and directives["signal"] == "USR2@120"
    (tmp_path / "job.sh").write_text(script.replace("srun", "true srun") + '\nprintf %s "$PYTHONPATH"\n')
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.endswith(ODD)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("numbers", "state", "again"),
    [
        ([signal.SIGUSR1], "interrupted", True),
        ([signal.SIGUSR2, signal.SIGUSR1], "interrupted", True),
        ([signal.SIGTERM], "interrupted", False),
        ([signal.SIGUSR2, signal.SIGTERM], "interrupted", False),
        ([signal.SIGUSR1], "finished", False),
    ],
)
def test_a_job_is_queued_again_only_once_it_has_saved(
    numbers: list[int], state: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    events = []

    def fake(folder: Path, resources: Resources, limits: Limits, stop: Stop, nodes: Any) -> sweep_run.Status:
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        events.append(("saved", list(stop.received)))
        return sweep_run.Status(state=state)

    class Environment:
        hostnames, global_rank, job_id = ["n1"], 0, "5_1"

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    monkeypatch.setattr(sweep_slurm, "execute", fake)
    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    try:
        signal.signal(signal.SIGUSR2, lambda number, frame: events.append(("queued", number)))
        sweep_slurm.Job(CPU, Limits())(str(tmp_path))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert events[0][0] == "saved" and sorted(events[0][1]) == sorted(numbers)
    assert [event for event, _ in events[1:]] == (["queued"] if again else [])


def test_a_job_that_is_queued_again_does_the_same() -> None:
    pytest.importorskip("submitit")
    job = sweep_slurm.Job(CPU, Limits(run=5))
    delayed = job.checkpoint("folder")
    assert delayed.function == job and delayed.args == ("folder",)


with contextlib.suppress(ImportError):
    import submitit  # noqa: F401  (imported before handlers are replaced)
