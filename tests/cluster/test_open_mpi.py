"""Open MPI's ``mpirun`` over two hosts: ranks find each other without mpi4py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import ROOT, Lab, plain_environment, require, start_lab
from tests.cluster.training import (
    ADOPT,
    BLOCKS,
    adopted,
    arguments,
    check_one_rank_a_host,
    write_configs,
    write_deepspeed_env,
)

pytestmark = pytest.mark.cluster

MPIRUN = ["--allow-run-as-root", "--bind-to", "none", "--mca", "plm_rsh_agent", "ssh"]
MPIRUN += ["--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require("mpirun", "ompi_info")
    with start_lab(tmp_path_factory.mktemp("lab")) as hosts:
        yield hosts


def start(lab: Lab, folder: Path, *command: str, timeout: float = 300) -> tuple[int, str]:
    """The exit code and the output of a command on the first host."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in lab.hosts))
    log = folder / "launcher.log"
    process = lab["n1"].start(command, folder, log, plain_environment(PYTHONPATH=str(ROOT)))
    try:
        return process.wait(timeout=timeout), log.read_text()
    finally:
        process.kill()
        process.wait()


# DeepSpeed's launcher exports what .deepspeed_env names, mpirun what -x names.
COMMANDS = {
    "mpirun": ["mpirun", "-n", "2", "--hostfile", "hostfile", *MPIRUN, "-x", "PYTHONPATH", "-x", "DS_ACCELERATOR"]
    + ["-x", "OMP_NUM_THREADS", "-x", "MASTER_ADDR=n1", sys.executable, "-m"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", "--launcher", "openmpi"]
    + ["--launcher_args", " ".join(MPIRUN), "--module"],
}


@pytest.fixture(scope="module", params=COMMANDS)
def trained(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results."""
    folder = tmp_path_factory.mktemp("trained")
    write_deepspeed_env(folder, MASTER_ADDR="n1")
    train = arguments(folder, write_configs(folder))
    code, output = start(lab, folder, *COMMANDS[request.param], "meft_engine.run", *train)
    assert code == 0, output[-4000:]
    return folder


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_train_as_one_process_does(name: str, trained: Path, alone: dict[str, list[float]]) -> None:
    check_one_rank_a_host(trained, name, alone)


def test_ranks_on_several_hosts_need_an_address(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('started')")
    command = [text for text in COMMANDS["mpirun"] if text != "MASTER_ADDR=n1"]
    del command[command.index(sys.executable) - 1]
    code, output = start(lab, tmp_path, *command, "meft_engine.run", "train.py")
    assert code != 0 and "started" not in output.splitlines()
    assert "mpirun started 2 ranks and does not say on which host rank 0 is; set MASTER_ADDR" in output


def test_ranks_on_one_host_need_none(lab: Lab, tmp_path: Path) -> None:
    command = ["mpirun", "-n", "2", "--oversubscribe", *MPIRUN, sys.executable, "-c", ADOPT]
    code, output = start(lab, tmp_path, *command)
    assert code == 0, output
    found = adopted(output)
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["LOCAL_SIZE"]) for rank in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert {rank["MASTER_ADDR"] for rank in found} == {"127.0.0.1"}
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
