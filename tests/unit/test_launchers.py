"""What ranks make of the variables of ``srun`` and ``mpirun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_engine.launchers import LaunchError, adopt_ranks, expand_hosts

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "4(x3)",
    "SLURM_JOB_NODELIST": "gpu-a[08-10]",
    "SLURM_STEP_NODELIST": "gpu-a[09-10],gpu-b1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "2023686145",
}
SEVERAL_HOSTS = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
ANYTHING_ELSE = {"PATH": "/bin", "HOME": "/root"}


def adopted(*variables: dict[str, Any]) -> dict[str, str]:
    """What :func:`adopt_ranks` adds to these variables; later ones win, and ``None`` removes one."""
    merged = {name: value for some in variables for name, value in some.items()}
    before = {name: value for name, value in merged.items() if value is not None}
    after = dict(before)
    adopt_ranks(after)
    assert before.items() <= after.items(), "what was given stays as it is"
    return {name: value for name, value in after.items() if name not in before}


def test_ranks_of_srun():
    assert adopted(ANYTHING_ELSE, SLURM) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-a09",
        "MASTER_PORT": str(20000 + 8 * 4711 % 12000),
    }


def test_ranks_of_mpirun():
    found = adopted(ANYTHING_ELSE, OPEN_MPI)
    assert 20000 <= int(found.pop("MASTER_PORT")) < 32000
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "LOCAL_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
    }


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({**SLURM, "RANK": "0"}, id="RANK is set, Slurm"),
        pytest.param({**OPEN_MPI, "RANK": "0"}, id="RANK is set, Open MPI"),
        pytest.param({**SLURM, "RANK": "0", "WORLD_SIZE": "2", "SLURM_LOCALID": "9"}, id="whatever Slurm says"),
        pytest.param(
            {name: value for name, value in SLURM.items() if "STEP" not in name},
            id="a batch script of several tasks",
        ),
        pytest.param({"PMI_SIZE": "4", "PMI_RANK": "1"}, id="Intel MPI or MPICH"),
        pytest.param({"PMIX_RANK": "0"}, id="another launcher"),
    ],
)
def test_nothing_changes(variables):
    assert adopted(ANYTHING_ELSE, variables) == {}


ONE = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
ONE |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="no launcher"),
        pytest.param({"WORLD_SIZE": "1", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "3"}, id="a batch script of one task"),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, id="srun -n 1"),
        pytest.param({**OPEN_MPI, **ONE}, id="mpirun -n 1"),
        pytest.param({**SLURM, **OPEN_MPI, **ONE}, id="mpirun -n 1 in a Slurm job"),
    ],
)
def test_a_process_by_itself_is_rank_0_of_1(variables):
    found = adopted(ANYTHING_ELSE, variables)
    assert 1024 <= int(found.pop("MASTER_PORT")) < 65536
    one = dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), "1")
    assert {**variables, **found} == {**variables, **one, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ports = {adopted(ANYTHING_ELSE)["MASTER_PORT"] for _ in range(3)}
    assert all(1024 <= int(port) < 65536 for port in ports), "one that is free"


@pytest.mark.parametrize("launcher", [SLURM, OPEN_MPI], ids=["srun", "mpirun"])
@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", "head.example.org"), ("MASTER_PORT", "29511")])
def test_what_is_given_is_kept(launcher, name, value):
    found = adopted(launcher, {name: value})
    assert found == {key: text for key, text in adopted(launcher).items() if key != name}


def test_a_given_size_that_fits_is_no_contradiction():
    assert adopted(SLURM, {"WORLD_SIZE": "5"})["RANK"] == "3"


@pytest.mark.parametrize(
    ("rank", "node", "local_rank", "local_size"),
    [(0, 0, 0, "2"), (1, 0, 1, "2"), (2, 1, 0, "2"), (3, 1, 1, "2"), (4, 2, 0, "1")],
)
def test_every_rank_of_uneven_nodes(rank, node, local_rank, local_size):
    own = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)}
    found = adopted(SLURM, own)
    assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_SIZE"]) == (str(rank), str(local_rank), local_size)
    shared = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [found[name] for name in shared] == [adopted(SLURM)[name] for name in shared], "ranks agree"


@pytest.mark.parametrize(
    ("absent", "present", "local_size"),
    [
        (("SLURM_STEP_TASKS_PER_NODE",), {}, "4"),
        (("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), {"SLURM_NTASKS_PER_NODE": "3"}, "3"),
    ],
)
def test_where_slurm_says_how_many_ranks_a_node_has(absent, present, local_size):
    found = adopted(SLURM, dict.fromkeys(absent), present)
    assert found["LOCAL_SIZE"] == found["LOCAL_WORLD_SIZE"] == local_size


def test_the_nodes_of_the_job_where_those_of_the_step_are_not_named():
    assert adopted(SLURM, {"SLURM_STEP_NODELIST": None})["MASTER_ADDR"] == "gpu-a08"


def test_jobs_and_steps_have_ports_of_their_own():
    ports = {
        (job, step): int(adopted(SLURM, {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job in (1, 2, 3, 70_000_001)
        for step in range(4)
    }
    assert len(set(ports.values())) == len(ports)
    assert all(20000 <= port < 32000 for port in ports.values()), "below the ports of outgoing connections"


def test_runs_of_mpirun_have_ports_of_their_own():
    names = ("2023686145", "2023751681", "prterun-n1-4711@1")
    assert len({adopted(OPEN_MPI, {"PMIX_NAMESPACE": name})["MASTER_PORT"] for name in names}) == len(names)


def test_mpirun_in_a_slurm_job_is_open_mpis():
    """Its daemons are the step's tasks, and ranks inherit their variables."""
    found = adopted(SLURM, OPEN_MPI, SEVERAL_HOSTS, {"MASTER_ADDR": "n1"})
    assert (found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_SIZE"]) == ("4", "1", "2")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**OPEN_MPI, **SEVERAL_HOSTS}, "mpirun started 4 ranks and does not say on which host rank 0 is; set MASTER_"),
        ({**SLURM, "SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, "srun started 5 ranks and does not say"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but python started 1 ranks; unset WORLD_SIZE"),
        ({**SLURM, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 5 ranks; unset WORLD_SIZE"),
        ({**SLURM, "SLURM_PROCID": "5"}, "srun says rank 5 of 5 and local rank 1 of 2, which contradict"),
        ({**SLURM, "SLURM_LOCALID": "2"}, "local rank 2 of 2, which contradict"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "6"}, "local rank 3 of 6, which contradict"),
        ({**SLURM, "SLURM_LOCALID": None}, "SLURM_LOCALID is None; the launcher has to set it to a number"),
        ({**SLURM, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x'"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is ''"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(2)"}, "SLURM_STEP_TASKS_PER_NODE is '2(2)'; it has to look like"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID is 3, but SLURM_STEP_TASKS_PER_NODE, '2(x2),1', is of 3 nodes"),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[1-"}, "'n[1-', cannot be read; set MASTER_ADDR"),
    ],
)
def test_what_cannot_be_known_is_refused_in_one_sentence(variables, words):
    given_variables = {name: value for name, value in variables.items() if value is not None}
    before = dict(given_variables)
    with pytest.raises(LaunchError) as raised:
        adopt_ranks(given_variables)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert given_variables == before, "nothing is set halfway"


def test_a_given_address_needs_no_list_of_nodes():
    found = adopted(SLURM, {"SLURM_STEP_NODELIST": "n[1-", "MASTER_ADDR": "n1"})
    assert found["RANK"] == "3"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", "n1"),
        ("n[1-3,7],gpu-a[01-02]", "n1 n2 n3 n7 gpu-a01 gpu-a02"),
        ("head,n[08-11]", "head n08 n09 n10 n11"),
        ("n[098-101],x", "n098 n099 n100 n101 x"),
        ("r[1-2]n[0-1,3]", "r1n0 r1n1 r1n3 r2n0 r2n1 r2n3"),
        ("n[5]", "n5"),
        ("a.example.org,b-1.example.org", "a.example.org b-1.example.org"),
    ],
)
def test_a_list_of_nodes_is_expanded(nodes, names):
    assert expand_hosts(nodes) == names.split()


@pytest.mark.parametrize("nodes", ["", ",", "n[1-3", "n1-3]", "n[]", "n[a-b]", "n[1-2-3]", "n[1,]", "n[3-1]"])
def test_a_list_that_is_none_is_refused(nodes):
    with pytest.raises(LaunchError, match="set MASTER_ADDR and RANK yourself"):
        expand_hosts(nodes)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 20)), min_size=1, max_size=5))
def test_ranges_hold_what_they_say(ranges):
    text = ",".join(f"{first:02}-{first + more:02}" for first, more in ranges)
    numbers = [number for first, more in ranges for number in range(first, first + more + 1)]
    assert expand_hosts(f"n[{text}]") == [f"n{number:02}" for number in numbers]


def run_module(variables: dict[str, str], script: str) -> subprocess.CompletedProcess:
    """``python -m meft_engine.run SCRIPT`` with only these variables of a launcher."""
    prefixes = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMIX_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    command = [sys.executable, "-m", "meft_engine.run", script]
    return subprocess.run(command, env={**plain, **variables}, capture_output=True, text=True, timeout=120)


def test_a_script_sees_its_rank(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    done = run_module(SLURM, str(script))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert adopted(SLURM).items() <= seen.items()


def test_a_script_that_cannot_know_its_peers_does_not_start(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('started')")
    done = run_module({**OPEN_MPI, **SEVERAL_HOSTS}, str(script))
    assert done.returncode == 1 and "started" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("meft_engine.run: mpirun started 4 ranks")
