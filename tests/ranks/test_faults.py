"""A rank that is killed or stopped at any moment: the others name it and end, and the next start goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meft_engine.checkpoint.saved_adapter import SavedAdapter
from tests.ranks.worlds import end_world, start_world

pytestmark = pytest.mark.ranks

TIMEOUT = 6.0
RANKS = 3
SHM = Path("/dev/shm")
BUFFER = "deepspeed_allreduce_buffer_"


class Victims:
    """A world that trains and saves in ``folder``; what is left of it is ended with the context."""

    def __init__(self, folder: Path, name: str, stage: int, *more: str, **environment: str) -> None:
        self.logs = folder / name
        arguments = ["-m", "tests.ranks.victim", str(folder), str(stage), str(TIMEOUT), *more]
        self.world = start_world(self.logs, RANKS, arguments, **environment)

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *exception: object) -> None:
        end_world(self.world)

    def log(self, rank: int) -> str:
        return (self.logs / f"{rank}.log").read_text()

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, [self.log(rank)[-2000:] for rank in range(RANKS)]
            time.sleep(0.02)

    def train(self, steps: int) -> None:
        """Wait until every rank has taken so many steps since it was started."""
        enough = lambda: all(self.log(rank).count("step ") >= steps for rank in range(RANKS))  # noqa: E731
        self.wait_until(lambda: enough() or any(p.poll() is not None for p in self.world), 120)
        assert enough(), [self.log(rank)[-2000:] for rank in range(RANKS)]

    def others_end(self, lost: int) -> float:
        """The others end with non-zero codes and name the lost rank; how long the last of them took."""
        began = time.monotonic()
        others = [rank for rank in range(RANKS) if rank != lost]
        for rank in others:
            left = TIMEOUT + 1.0 - (time.monotonic() - began)  # a second for the machine
            try:
                code = self.world[rank].wait(timeout=max(0.1, left))
            except subprocess.TimeoutExpired:
                pytest.fail(f"rank {rank} goes on after {TIMEOUT} s: {self.log(rank)[-3000:]}")
            assert code != 0
            assert f"rank {lost} (host " in self.log(rank), self.log(rank)[-3000:]
            assert f"process {self.world[lost].pid})" in self.log(rank)
        return time.monotonic() - began


def check_whole(folder: Path) -> int:
    """Everything that the newest checkpoint consists of can be read; its step."""
    tag = folder / (folder / "latest").read_text()
    with SavedAdapter(tag / "meft") as saved:
        saved.require_whole()
        assert saved.shards.ranks == RANKS
        assert saved.shards.read("model.layers.0.mlp/keys", "exp_avg", slice(0, 120)).shape == (120, 32)
    states = list(tag.glob("*.pt"))
    assert states
    for path in states:
        # DeepSpeed's optimizer states hold objects of its own; these have just been written here.
        torch.load(path, weights_only="optim_states" not in path.name)
    # What has its final name anywhere is whole.
    for path in folder.glob("*/meft/*.safetensors"):
        load_file(path)
    return int(tag.name.removeprefix("global_step"))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_rank_that_is_killed_at_any_moment(stage, tmp_path):
    """Ten moments in each of two stages; every start goes on from what the last one saved."""
    draw, before, saved = random.Random(stage), set(os.listdir(SHM)), 0
    for number in range(10):
        with Victims(tmp_path, str(number), stage) as victims:
            victims.train(4)
            lost = draw.randrange(RANKS)
            time.sleep(draw.uniform(0, 1.5))
            victims.world[lost].send_signal(signal.SIGKILL)
            victims.others_end(lost)
            if saved:
                assert f"resumed at {saved}" in victims.log(0)
        step = check_whole(tmp_path)
        assert step >= saved + 3
        saved = step
    assert set(os.listdir(SHM)) == before


@pytest.mark.parametrize("lost", range(RANKS))
def test_a_rank_that_is_stopped(lost, tmp_path):
    """It neither dies nor answers."""
    with Victims(tmp_path, "logs", 0) as victims:
        victims.train(4)
        victims.world[lost].send_signal(signal.SIGSTOP)
        victims.others_end(lost)
    check_whole(tmp_path)


def test_a_rank_whose_script_fails_is_quoted(tmp_path):
    with Victims(tmp_path, "logs", 0, "4", "bad batch") as victims:
        victims.wait_until(lambda: victims.world[1].poll() is not None, 120)
        assert victims.world[1].returncode != 0
        victims.others_end(1)
        for rank in (0, 2):
            assert f"process {victims.world[1].pid}) ended with ValueError: bad batch" in victims.log(rank)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_script_that_never_destroys_its_engine_ends_well(stage, tmp_path):
    with Victims(tmp_path, "logs", stage, "4") as victims:
        codes = [process.wait(timeout=120) for process in victims.world]
        assert codes == [0] * RANKS, [victims.log(rank)[-2000:] for rank in range(RANKS)]


def test_buffers_of_killed_ranks_are_gone_after_the_next_start(tmp_path):
    """DeepSpeed's own, 69 MB each, which it leaves to the system's next restart."""
    before = {name for name in os.listdir(SHM) if name.startswith(BUFFER)}
    with Victims(tmp_path, "killed", 0, MEFT_TEST_SHM="1") as victims:
        victims.wait_until(lambda: all("step " in victims.log(rank) for rank in range(RANKS)), 400)
        for process in victims.world:
            process.send_signal(signal.SIGKILL)
    left = {name for name in os.listdir(SHM) if name.startswith(BUFFER)} - before
    if not left:
        pytest.skip("DeepSpeed's operator for shared memory does not compile here, and leaves nothing")
    time.sleep(11)  # fresh ones may be another job's that is just starting
    with Victims(tmp_path, "next", 0) as victims:
        victims.train(1)
    assert not left & set(os.listdir(SHM))
