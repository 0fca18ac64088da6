"""The cores that belong to this process, and how the ranks of a host divide what they share.

A core here is a logical CPU; hyperthreads of one another make up a physical core. A quota of CPU time (``cpu.max`` of a
cgroup) is not looked at: it limits for how long cores are used, not which.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Topology:
    """Where cores sit. One of which nothing is known is a physical core of its own on NUMA node 0."""

    physical: Mapping[int, int]  # of each core: the first core of its physical core
    nodes: Mapping[int, int]  # of each core: its NUMA node

    @classmethod
    def read(cls, system: Path = Path("/sys/devices/system")) -> Topology:
        """The topology of this machine; where the kernel does not tell it, that of psutil's count of cores."""
        physical = {core: core for core in range(psutil.cpu_count() or 1)}
        nodes = dict.fromkeys(physical, 0)
        with suppress(OSError, ValueError):
            for file in system.glob("cpu/cpu*/topology/thread_siblings_list"):
                siblings = _from_ranges(file.read_text())
                physical.update(dict.fromkeys(siblings, min(siblings)))
            for file in system.glob("node/node*/cpulist"):
                node = int(file.parent.name.removeprefix("node"))
                nodes.update(dict.fromkeys(_from_ranges(file.read_text()), node))
        return cls(physical, nodes)

    def place(self, core: int) -> tuple[int, int]:
        """NUMA node and physical core; sorted by it, neighbours are near each other."""
        return self.nodes.get(core, 0), self.physical.get(core, core)


@dataclass(frozen=True)
class CoreShare:
    """The cores of one rank for its passes over rows and their updates; what was chosen and why, for the log."""

    cores: frozenset[int]
    sentence: str


_claimed: frozenset[int] | None = None


def claim_cores(cores: frozenset[int] | None) -> None:
    """Take these cores for this process's rows, in place of all that it may use; ``None``: all again."""
    global _claimed
    _claimed = cores


def rank_cores() -> set[int]:
    """The cores for this process's rows: its share of its host's, where it has claimed one, or all that it may use."""
    return set(_claimed) if _claimed is not None else allowed_cores()


def allowed_cores() -> set[int]:
    """The cores that this process may use: the union over its threads, since OpenMP may have bound some of them."""
    cores: set[int] = set()
    try:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                cores |= os.sched_getaffinity(int(task.name))
    except OSError:
        pass
    return cores or set(range(os.cpu_count() or 1))


@contextmanager
def running_on(cores: Iterable[int] | None) -> Iterator[None]:
    """Keep this thread on some cores, and torch's work on this thread, so that pages that are written for the first
    time lie near these cores; ``None``: change nothing."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def share_cores(local_rank: int, allowed: Sequence[set[int]], topology: Topology) -> CoreShare:
    """The cores of one rank, always some of those that it may use. All ranks of a host come to the same division.

    A rank that shares no core with another keeps what it has. Ranks that may use the same cores divide them evenly,
    each with whole physical cores while there are enough, and on one NUMA node unless there are fewer ranks than nodes;
    a node too small for the share of a rank may then stay unused. Ranks share a core where there are too few. Sets
    that overlap without being equal are divided as evenly as going through their cores once allows.

    Args:
        local_rank: of the rank on its host. allowed: of each rank of the host, what it may use (:func:`allowed_cores`).
        topology: of the host.
    """
    assert all(allowed), "a process has at least one core"
    shares = _divide_among_all([frozenset(cores) for cores in allowed], topology)
    mine, others = shares[local_rank], [rank for rank in range(len(allowed)) if rank != local_rank]
    rivals = sum(not allowed[local_rank].isdisjoint(allowed[rank]) for rank in others)
    crowd = sum(not mine.isdisjoint(shares[rank]) for rank in others)
    if not others:
        reason = "all that this process may use"
    elif not rivals:
        reason = "to which the launcher has bound this rank"
    elif crowd:
        reason = f"which {crowd + 1} ranks of this host share for want of others"
    else:
        reason = f"its part of the {len(allowed[local_rank])} that {rivals + 1} ranks of this host may use"
    nodes = {topology.place(core)[0] for core in mine}
    place = f"core{'s' * (len(mine) > 1)} {_ranges(mine)} of NUMA node{'s' * (len(nodes) > 1)} {_ranges(nodes)}"
    return CoreShare(mine, f"rank {local_rank} of this host updates its rows on {place}, {reason}")


def _divide_among_all(allowed: list[frozenset[int]], topology: Topology) -> list[frozenset[int]]:
    """The cores of every rank: first divided between sets that overlap, then between the ranks that have one set."""
    ranks_of: dict[frozenset[int], list[int]] = {}
    for rank, cores in enumerate(allowed):
        ranks_of.setdefault(cores, []).append(rank)
    sets, sizes = list(ranks_of), [len(ranks) for ranks in ranks_of.values()]
    claimed: dict[tuple, set[int]] = {}  # hyperthreads that the same ranks may use stay together
    for core in frozenset().union(*sets):
        holders = tuple(index for index, cores in enumerate(sets) if core in cores)
        claimed.setdefault((len(holders), topology.place(core), holders), set()).add(core)
    pools = [set() for _ in sets]
    for (_, _, holders), cores in sorted(claimed.items()):  # what few may use first; the rest makes up for it
        pools[min(holders, key=lambda index: (len(pools[index]) / sizes[index], len(sets[index])))] |= cores
    shares = {}
    for (cores, ranks), pool in zip(ranks_of.items(), pools, strict=True):
        shares |= zip(ranks, _divide_evenly(pool or cores, len(ranks), topology), strict=True)
    return [shares[rank] for rank in range(len(allowed))]


def _divide_evenly(cores: Iterable[int], ranks: int, topology: Topology) -> list[frozenset[int]]:
    """Shares of ``ranks`` ranks that may all use the same cores, in the order of NUMA nodes and physical cores."""
    together: dict[tuple[int, int], list[int]] = {}
    for core in sorted(cores):
        together.setdefault(topology.place(core), []).append(core)
    pieces = [(node, unit) for (node, _), unit in sorted(together.items())]
    if len(pieces) < ranks:
        pieces = [(node, [core]) for node, unit in pieces for core in unit]
    if len(pieces) < ranks:
        return [frozenset(pieces[rank % len(pieces)][1]) for rank in range(ranks)]
    on_node = {node: [unit for there, unit in pieces if there == node] for node, _ in pieces}
    if ranks < len(on_node):
        return _cut([unit for _, unit in pieces], ranks)
    placed = dict.fromkeys(on_node, 0)
    for _ in range(ranks):  # Sainte-Laguë's method, which keeps to the proportion of the nodes' cores
        placed[max(placed, key=lambda node: (len(on_node[node]) / (2 * placed[node] + 1), -placed[node]))] += 1
    return [share for node, units in on_node.items() for share in _cut(units, placed[node])]


def _cut(units: list[list[int]], parts: int) -> list[frozenset[int]]:
    """``parts`` runs of ``units`` whose lengths differ by at most one."""
    bounds = [len(units) * part // parts for part in range(parts + 1)] if parts else []
    return [frozenset().union(*units[begin:end]) for begin, end in itertools.pairwise(bounds)]


def _from_ranges(text: str) -> list[int]:
    """``0-2,8`` as 0, 1, 2, 8: the kernel's way to write a set of cores."""
    ends = [[int(end) for end in part.split("-")] for part in text.strip().split(",") if part]
    return [core for pair in ends for core in range(pair[0], pair[-1] + 1)]


def _ranges(numbers: Iterable[int]) -> str:
    """The opposite of :func:`_from_ranges`."""
    numbers = set(numbers)
    first = sorted(number for number in numbers if number - 1 not in numbers)
    last = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(first, last, strict=True))
