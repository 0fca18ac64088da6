"""``deepspeed --hostfile`` over two hosts: ranks train as one process does, and end well when a host is cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import ROOT, Lab, plain_environment, require, start_lab
from tests.cluster.training import (
    BLOCKS,
    arguments,
    mean_losses,
    placement,
    results,
    train_alone,
    write_configs,
    write_deepspeed_env,
)

pytestmark = pytest.mark.cluster

GLOO = Path(__file__).parent / "scripts" / "gather.py"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require("pdsh")
    with start_lab(tmp_path_factory.mktemp("lab")) as hosts:
        yield hosts


def launch(lab: Lab, folder: Path, slots: int, *command: str, **variables: str) -> None:
    """``deepspeed --hostfile`` on the first host, with ``slots`` ranks on each; it has to end well.

    Args:
        variables: what ``.deepspeed_env`` names besides what all ranks here need.
    """
    (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in lab.hosts))
    write_deepspeed_env(folder, **variables)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", *command]
    first, log = next(iter(lab.hosts.values())), folder / "launcher.log"
    process = first.start(launcher, folder, log, plain_environment(PYTHONPATH=str(ROOT)))
    try:
        assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank a host", "two ranks a host"])
def trained(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder of results, and the ranks per host."""
    folder = tmp_path_factory.mktemp("trained")
    train = arguments(folder, write_configs(folder))
    launch(lab, folder, request.param, "--module", "meft_engine.run", *train)
    return folder, request.param


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_train_as_one_process_does(name: str, trained: tuple[Path, int], alone: dict[str, list[float]]) -> None:
    folder, slots = trained
    found = results(folder, name)
    assert placement(found) == [(host, str(i), str(slots)) for host in ("n1", "n2") for i in range(slots)]
    assert {result["engine"] for result in found} == {"DeepSpeedEngine" if BLOCKS[name] is None else "MeftEngine"}
    losses = mean_losses(found)
    assert losses == pytest.approx(alone[name][: len(losses)], abs=1e-5)
    assert alone[name][-1] < alone[name][0] - 0.1, "they learn"


def test_hosts_whose_own_names_are_loopback_need_the_interface_named(tmp_path: Path) -> None:
    """Gloo listens at the address of its host's name, which no other host reaches where that is 127.0.1.1."""
    require("pdsh")
    (tmp_path / "lab").mkdir()
    with start_lab(tmp_path / "lab", loopback_names=True) as lab:
        assert lab["n2"].run(["getent", "hosts", "n2"]).split()[0] == "127.0.1.1"
        launch(lab, tmp_path, 1, str(GLOO), str(tmp_path), GLOO_SOCKET_IFNAME="eth0")
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["n1 n2"] * 2


TIMEOUT = 6.0
"""Seconds of ``communication.timeout``."""
SAVE_EVERY = 3


class Cut:
    """Two ranks on each of two hosts that train until the second host's cable is pulled."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder, self.checkpoints = lab, folder, folder / "checkpoints"
        self.seconds: dict[int, float] = {}
        """From the cut until each rank had ended."""
        self.codes: dict[int, int] = {}
        (self.config,) = (c for c in write_configs(folder, communication={"timeout": TIMEOUT}) if c.stem == "meft")

    def train_and_cut(self) -> None:
        """Until every rank has ended, or twice the timeout is over."""
        ranks = [self._start(rank) for rank in range(4)]
        try:
            self._wait_for_step(2 * SAVE_EVERY + 1, ranks)
            self.lab.link_down("n2")
            began = time.monotonic()
            while len(self.codes) < 4 and time.monotonic() < began + 2 * TIMEOUT:
                for rank, process in enumerate(ranks):
                    if rank not in self.codes and process.poll() is not None:
                        self.codes[rank], self.seconds[rank] = process.returncode, time.monotonic() - began
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    def log(self, rank: int) -> str:
        """What a rank wrote to its output."""
        return (self.folder / f"rank{rank}.log").read_text()

    def _start(self, rank: int) -> subprocess.Popen:
        # Not by DeepSpeed's launcher, which ends the others of a host when one ends, and hides with what code.
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "LOCAL_SIZE": "2", "WORLD_SIZE": "4"}
        there = {"MASTER_ADDR": self.lab["n1"].address, "MASTER_PORT": "29500", "PYTHONPATH": str(ROOT)}
        options = {"checkpoints": self.checkpoints, "save_every": SAVE_EVERY, "steps": 1000, "pause": 0.5}
        command = [sys.executable, "-m", "meft_engine.run", *arguments(self.folder, [self.config], **options)]
        host = self.lab["n1" if rank < 2 else "n2"]
        return host.start(command, self.folder, self.folder / f"rank{rank}.log", plain_environment(**own, **there))

    def _wait_for_step(self, step: int, ranks: list[subprocess.Popen]) -> None:
        until = time.monotonic() + 300
        files = [self.folder / f"meft.rank{rank}.json" for rank in range(4)]
        while not all(f.exists() and len(json.loads(f.read_text())["losses"]) >= step for f in files):
            for rank, process in enumerate(ranks):
                assert process.poll() is None, self.log(rank)[-4000:]
            assert time.monotonic() < until, "\n".join(self.log(rank)[-1500:] for rank in range(4))
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cut(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    """After the cut; the cable stays out while tests use it."""
    found = Cut(lab, tmp_path_factory.mktemp("cut"))
    try:
        found.train_and_cut()
        yield found
    finally:
        lab.link_up("n2")


def test_every_rank_ends_in_time_and_names_whom_it_lost(cut: Cut) -> None:
    logs = "\n".join(f"rank {rank}: {cut.log(rank)[-1500:]}" for rank in range(4))
    assert sorted(cut.codes) == [0, 1, 2, 3] and 0 not in cut.codes.values(), logs
    assert max(cut.seconds.values()) < TIMEOUT, (cut.seconds, logs)
    for rank in (0, 1):
        assert "rank 2 (host n2" in cut.log(rank) and "rank 3 (host n2" in cut.log(rank), logs
        assert "rank 1 (host n1" not in cut.log(rank), logs
    for rank in (2, 3):
        # Those who lose rank 0 hear of nobody else.
        assert "rank 0 (host n1" in cut.log(rank), logs


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_host_goes_on_from_the_last_checkpoint(
    ranks: int, cut: Cut, alone: dict[str, list[float]], tmp_path: Path
) -> None:
    saved_at = int((cut.checkpoints / "latest").read_text().removeprefix("global_step"))
    steps = len(alone["meft"])
    assert 2 * SAVE_EVERY <= saved_at < steps and saved_at % SAVE_EVERY == 0
    options = {"checkpoints": cut.checkpoints, "steps": steps}
    if ranks == 1:
        train_alone(tmp_path, [cut.config], **options)
    else:
        write_deepspeed_env(tmp_path)
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        command = [*launcher, "--module", "meft_engine.run", *arguments(tmp_path, [cut.config], **options)]
        environment = plain_environment(PYTHONPATH=str(ROOT))
        process = cut.lab["n1"].start(command, tmp_path, tmp_path / "launcher.log", environment)
        assert process.wait(timeout=300) == 0, (tmp_path / "launcher.log").read_text()[-4000:]
    found = results(tmp_path, "meft")
    assert [result["first_step"] for result in found] == [saved_at] * ranks
    assert mean_losses(found) == pytest.approx(alone["meft"][saved_at:], abs=1e-4)


def test_the_launcher_ends_when_a_host_is_cut_off(lab: Lab, tmp_path: Path) -> None:
    """``deepspeed --hostfile`` itself, whose ssh has to be told how long to wait for a host."""
    lab.link_up("n2")  # which the tests above have cut off
    (config,) = (c for c in write_configs(tmp_path, communication={"timeout": TIMEOUT}) if c.stem == "meft")
    options = {"checkpoints": tmp_path / "checkpoints", "save_every": SAVE_EVERY, "steps": 1000, "pause": 0.3}
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    write_deepspeed_env(tmp_path)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile"]
    command = [*launcher, "--module", "meft_engine.run", *arguments(tmp_path, [config], **options)]
    patience = "-o ServerAliveInterval=1 -o ServerAliveCountMax=3"
    environment = plain_environment(PYTHONPATH=str(ROOT), PDSH_SSH_ARGS_APPEND=patience)
    log = tmp_path / "launcher.log"
    process = lab["n1"].start(command, tmp_path, log, environment)
    try:
        until = time.monotonic() + 300
        files = [tmp_path / f"meft.rank{rank}.json" for rank in range(2)]
        while not all(f.exists() and len(json.loads(f.read_text())["losses"]) > 2 * SAVE_EVERY for f in files):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.1)
        lab.link_down("n2")
        began = time.monotonic()
        assert process.wait(timeout=5 * TIMEOUT) != 0
        assert "rank 1 (host n2" in log.read_text(), log.read_text()[-4000:]
        # Ranks end in time; DeepSpeed's launcher on a host looks after them once a second.
        for what, seconds in (("--local_rank", TIMEOUT), ("train.py", TIMEOUT + 2)):
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            for host in lab.hosts.values():
                assert what not in host.run(["ps", "-eo", "args"]), f"{what} goes on at {host.name}"
    finally:
        process.kill()
        process.wait()
        lab.link_up("n2")
    tag = (tmp_path / "checkpoints" / "latest").read_text()
    assert sorted(path.name for path in (tmp_path / "checkpoints" / tag / "meft").glob("rows-*")) == [
        "rows-0-of-2.safetensors",
        "rows-1-of-2.safetensors",
    ]
