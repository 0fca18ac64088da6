"""A real Slurm over two hosts: ranks that ``srun`` starts find each other without mpi4py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meft_engine.run
from meft_engine.launchers import expand_hosts
from tests.cluster.lab import require, start_lab
from tests.cluster.slurm import PROGRAMS, Slurm, start_slurm
from tests.cluster.training import (
    ADOPT,
    BLOCKS,
    adopted,
    arguments,
    check_one_rank_a_host,
    write_configs,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require(*PROGRAMS)
    with start_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield start_slurm(lab, tmp_path_factory.mktemp("slurm"))


def test_uneven_nodes(slurm: Slurm, tmp_path: Path) -> None:
    found = adopted(slurm.run(["srun", "-N", "2", "-n", "3", sys.executable, "-c", ADOPT], tmp_path))
    seen = [(r["RANK"], r["host"], r["LOCAL_RANK"], r["LOCAL_SIZE"], r["WORLD_SIZE"], r["MASTER_ADDR"]) for r in found]
    assert seen == [
        ("0", "n1", "0", "2", "3", "n1"),
        ("1", "n1", "1", "2", "3", "n1"),
        ("2", "n2", "0", "1", "3", "n1"),
    ]
    assert len({rank["MASTER_PORT"] for rank in found}) == 1


def test_a_step_on_one_node_of_a_job_on_two(slurm: Slurm, tmp_path: Path) -> None:
    """The batch script is no rank, and its steps have hosts and ports of their own."""
    (tmp_path / "adopt.py").write_text(ADOPT)
    rank, step = f"{sys.executable} adopt.py", "srun --exact -n 2 -N 1 --output step-%s.out"
    first, second = (f"{step % node} -w {node} {rank}" for node in ("n1", "n2"))
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\n{rank}\n{first} & {second} & wait\n")
    slurm.run(["sbatch", "--wait", "-N", "2", "--ntasks-per-node", "2", "--output", "job.out", "job.sh"], tmp_path)
    (batch,) = adopted((tmp_path / "job.out").read_text())
    assert batch.pop("host") == "n1" and set(batch.values()) == {None}
    steps = {node: adopted((tmp_path / f"step-{node}.out").read_text()) for node in ("n1", "n2")}
    for node, ranks in steps.items():
        assert [(rank["RANK"], rank["LOCAL_SIZE"], rank["MASTER_ADDR"]) for rank in ranks] == [
            ("0", "2", node),
            ("1", "2", node),
        ]
    assert steps["n1"][0]["MASTER_PORT"] != steps["n2"][0]["MASTER_PORT"]


@pytest.mark.parametrize(
    "nodes", ["n[1-3,7],gpu-a[01-02]", "n[098-101],x", "head,n08,n[10-11]", "r[1-2]n[0-1,3]", "n[5]"]
)
def test_lists_of_nodes_are_expanded_as_slurm_does(nodes: str, slurm: Slurm, tmp_path: Path) -> None:
    assert expand_hosts(nodes) == slurm.run(["scontrol", "show", "hostnames", nodes], tmp_path).split()


# DeepSpeed 0.19 leaves --module out of srun's command line: the module is named by its file.
COMMANDS = {
    "srun": ["srun", "-N", "2", "-n", "2", sys.executable, "-m", "meft_engine.run"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", "--no_ssh_check"]
    + ["--launcher", "slurm", "--launcher_args", "-N 2", "--master_addr", "n1", meft_engine.run.__file__],
}


@pytest.fixture(scope="module", params=COMMANDS)
def trained(request: pytest.FixtureRequest, slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    train = arguments(folder, write_configs(folder))
    slurm.run([*COMMANDS[request.param], *train], folder)
    return folder


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_train_as_one_process_does(name: str, trained: Path, alone: dict[str, list[float]]) -> None:
    check_one_rank_a_host(trained, name, alone)
