"""Ranks that Slurm's ``srun`` or Open MPI's ``mpirun`` started, told to PyTorch and DeepSpeed in their own variables.

DeepSpeed's launcher and ``torchrun`` set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and so on. ``srun`` and ``mpirun``
set variables of their own, and a process that was started by itself has none; DeepSpeed then asks mpi4py, which most
environments do not have.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

_FIRST_PORT, _PORTS = 20000, 12000
"""Ports of our choice end below 32768, from where Linux takes those of outgoing connections."""


_OTHER_LAUNCHERS = ("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
"""Set by launchers that are not read here: a process that has one of them may be one of many."""


class LaunchError(RuntimeError):
    """A launcher's variables do not say what ranks need to find each other; the message says what is missing."""


@dataclass(frozen=True)
class _Ranks:
    """What a launcher says of the process that it started."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    """Of rank 0's host; ``None`` where the launcher does not say it."""
    job: int | None
    """A number that all ranks of the run agree on and that other runs on the same hosts rarely have; ``None`` for one
    rank, which agrees with nobody."""


_ALONE = _Ranks("python", 0, 1, 0, 1, "127.0.0.1", None)


def adopt_ranks(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the variables that ``torch.distributed`` and DeepSpeed read, from those of ``srun`` or ``mpirun``.

    Sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_SIZE`` (DeepSpeed's name) and ``LOCAL_WORLD_SIZE``
    (PyTorch's); ``MASTER_ADDR`` and ``MASTER_PORT`` only where they are not given. A process that no launcher has
    started is rank 0 of 1. Nothing changes where ``RANK`` is set, or where the process may be one of several that
    another launcher started, or belongs to a batch script of several tasks that forgot its ``srun``.

    ``LOCAL_RANK`` chooses the device: every rank has to see all GPUs of its node (Slurm's ``--gpus-per-node``, not
    ``--gpus-per-task``).

    Args:
        environment: the variables; ``None`` for those of this process.

    Raises:
        LaunchError: if the variables contradict each other, or do not tell where rank 0 is.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables:
        return
    # mpirun in a Slurm job starts its daemons with srun, and ranks inherit the daemons' Slurm variables.
    ranks = _from_open_mpi(variables) or _from_slurm(variables) or _by_itself(variables)
    if ranks is None:
        return
    if not (0 <= ranks.rank < ranks.size and 0 <= ranks.local_rank < ranks.local_size <= ranks.size):
        raise LaunchError(
            f"{ranks.launcher} says rank {ranks.rank} of {ranks.size} and local rank {ranks.local_rank} of "
            f"{ranks.local_size}, which contradict each other; set RANK, WORLD_SIZE and LOCAL_RANK yourself"
        )
    given_size = variables.get("WORLD_SIZE")
    if given_size not in (None, str(ranks.size)):
        raise LaunchError(
            f"WORLD_SIZE is {given_size}, but {ranks.launcher} started {ranks.size} ranks; "
            "unset WORLD_SIZE, or set RANK as well"
        )
    address = variables.get("MASTER_ADDR") or ranks.address
    if address is None:
        raise LaunchError(
            f"{ranks.launcher} started {ranks.size} ranks and does not say on which host rank 0 is; "
            "set MASTER_ADDR to that host (mpirun -x MASTER_ADDR=HOST …)"
        )
    variables.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_SIZE=str(ranks.local_size),
        LOCAL_WORLD_SIZE=str(ranks.local_size),
        MASTER_ADDR=address,
        MASTER_PORT=variables.get("MASTER_PORT") or str(_port(ranks.job)),
    )


def _port(job: int | None) -> int:
    """The port of a run's rank 0; any that is free where nobody else has to know it."""
    if job is not None:
        return _FIRST_PORT + job % _PORTS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _from_open_mpi(variables: Mapping[str, str]) -> _Ranks | None:
    """What ``mpirun`` says, or ``None`` if it did not start this process."""
    if "OMPI_COMM_WORLD_RANK" not in variables:
        return None
    size = _number(variables, "OMPI_COMM_WORLD_SIZE")
    local_size = _number(variables, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return _Ranks(
        launcher="mpirun",
        rank=_number(variables, "OMPI_COMM_WORLD_RANK"),
        size=size,
        local_rank=_number(variables, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=local_size,
        address="127.0.0.1" if local_size == size else None,
        # The namespace names the run; it is a number in Open MPI 4 and a text in 5.
        job=zlib.crc32(variables.get("PMIX_NAMESPACE", "").encode()),
    )


def _by_itself(variables: Mapping[str, str]) -> _Ranks | None:
    """A process without a launcher, or ``None`` if it may have one that is not read here."""
    if any(name in variables for name in _OTHER_LAUNCHERS) or variables.get("SLURM_NTASKS", "1") != "1":
        return None
    return _ALONE


def _from_slurm(variables: Mapping[str, str]) -> _Ranks | None:
    """What ``srun`` says, or ``None`` if it did not start this process."""
    # A batch script, which is no rank, has SLURM_PROCID and SLURM_NTASKS too; only in a step is the step's size known.
    if "SLURM_PROCID" not in variables or "SLURM_STEP_NUM_TASKS" not in variables:
        return None
    size = _number(variables, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return replace(_ALONE, launcher="srun")
    # The step may use fewer nodes than its job. Where srun itself ran is no answer: that may be a login node.
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    needed = nodes and not variables.get("MASTER_ADDR")
    return _Ranks(
        launcher="srun",
        rank=_number(variables, "SLURM_PROCID"),
        size=size,
        local_rank=_number(variables, "SLURM_LOCALID"),
        local_size=_slurm_local_size(variables),
        address=expand_hosts(nodes)[0] if needed else None,
        # Steps of one job may run at the same time.
        job=8 * _number(variables, "SLURM_JOB_ID") + _number(variables, "SLURM_STEP_ID"),
    )


def _slurm_local_size(variables: Mapping[str, str]) -> int:
    """How many ranks of the step run on this node."""
    name = next(
        (n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if n in variables), "SLURM_NTASKS_PER_NODE"
    )
    if name == "SLURM_NTASKS_PER_NODE":
        return _number(variables, name)
    node, counts = _number(variables, "SLURM_NODEID"), []
    for entry in variables[name].split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if found is None:
            raise LaunchError(f'{name} is {variables[name]!r}; it has to look like "2(x3),1"')
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID is {node}, but {name}, {variables[name]!r}, is of {len(counts)} nodes")
    return counts[node]


def expand_hosts(nodes: str) -> list[str]:
    """The names in Slurm's list of nodes, in its order: ``"n[1-2,7],gpu[01-02]"`` is n1, n2, n7, gpu01, gpu02.

    Raises:
        LaunchError: if brackets do not match, or hold something else than numbers and ranges.
    """
    # Commas inside brackets separate numbers, those outside separate names.
    names = [name for entry in re.findall(r"(?:\[[^]]*\]|[^,])+", nodes) for name in _expand(entry, nodes)]
    if not names:
        raise LaunchError(f"Slurm's list of nodes, {nodes!r}, holds no name; set MASTER_ADDR and RANK yourself")
    return names


def _expand(entry: str, nodes: str) -> list[str]:
    """The names of one entry of a list; a name may have several brackets, of which the last varies fastest."""
    before, bracket, rest = entry.partition("[")
    inside, closed, after = rest.partition("]")
    if not bracket and "]" not in entry:
        return [entry]
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in inside.split(",")]
    if not closed or None in ranges:
        raise LaunchError(f"Slurm's list of nodes, {nodes!r}, cannot be read; set MASTER_ADDR and RANK yourself")
    # Numbers keep their leading zeros.
    numbers = [f"{n:0{len(r[1])}}" for r in ranges for n in range(int(r[1]), int(r[2] or r[1]) + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in _expand(after, nodes)]


def _number(variables: Mapping[str, str], name: str) -> int:
    """A variable that holds a count or an index."""
    value = variables.get(name)
    if value is None or not value.isdecimal():
        raise LaunchError(
            f"{name} is {value!r}; the launcher has to set it to a number, or set RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return int(value)
