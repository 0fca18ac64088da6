"""The processes that train together: which of them share a node, and the small things that they tell each other."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meft_engine.cores import CoreShare, Topology, allowed_cores, share_cores
from meft_engine.parallel.lifeline import Lifeline, listen


class RanksDisagreeError(RuntimeError):
    """A rank could not do its part, so that no rank goes on as if it had; the message names it."""


@dataclass
class Ranks:
    """All ranks of a run, as one of them sees them; with one rank nothing here ever communicates.

    Collectives run over the host's network (gloo), beside those of DeepSpeed and in groups of their own: every rank
    calls them in the same order. What is summed is summed in the order of the ranks, so that all get the same bits.
    """

    rank: int = 0
    size: int = 1
    nodes: list[list[int]] = field(default_factory=lambda: [[0]])
    """The ranks of each node, ascending; nodes in the order of their first ranks."""
    processes: list[int] = field(default_factory=lambda: [os.getpid()])
    """The process id of every rank, on its own node."""
    names: list[str] = field(default_factory=lambda: ["rank 0"])
    """What messages call every rank."""
    cores: CoreShare | None = None
    """This rank's share of its node's cores."""
    group: Any = None
    """For what training threads exchange."""
    publishing_group: Any = None
    """Of this rank's column, for what the threads that update rows send to other nodes; ``None`` on one node."""
    lifeline: Lifeline = field(default_factory=lambda: Lifeline(0, ["rank 0"], None, "alone", 1.0))

    @property
    def node(self) -> list[int]:
        """The ranks of this rank's node."""
        return next(node for node in self.nodes if self.rank in node)

    @property
    def local_rank(self) -> int:
        """This rank's place on its node."""
        return self.node.index(self.rank)

    @property
    def columns(self) -> list[list[int]]:
        """Ranks that publish rows to each other: those at the same place of their nodes, in the order of the nodes.

        As many as the smallest node has ranks, so that each has a rank on every node.
        """
        count = min(len(node) for node in self.nodes)
        return [
            [rank for node in self.nodes for place, rank in enumerate(node) if place % count == column]
            for column in range(count)
        ]

    def counterpart(self, rank: int, node: Sequence[int]) -> int:
        """The rank of ``node`` that receives there what ``rank``, of another node, has to say."""
        column = next(members for members in self.columns if rank in members)
        return next(other for other in node if other in column)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Block until a condition holds that other ranks of this node bring about.

        Raises:
            RankLostError: if a rank is lost meanwhile.
        """
        pause = 2e-5
        while not condition():
            self.lifeline.check()
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)

    def join_column(self, patience: timedelta) -> None:
        """Make the groups in which rows are published; all ranks take part in each, and keep that of their column."""
        for column in self.columns if len(self.nodes) > 1 else []:
            made = dist.new_group(column, backend="gloo", timeout=patience)
            if self.rank in column:
                self.publishing_group = made

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Inside, an error that comes of a lost rank is replaced by one that names it.

        Raises:
            RankLostError: if a rank is lost.
        """
        try:
            yield
        except RuntimeError:
            # The collective has failed a moment before it is known why.
            self.lifeline.check(wait=1.0)
            raise

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def gather(self, values: Tensor) -> Tensor:
        """[ranks, n] from the ``values`` [n] of every rank, on the host."""
        if self.size == 1:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        with self.communicating():
            dist.all_gather(gathered, values.contiguous(), group=self.group)
        return torch.stack(gathered)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ``values`` of all ranks, on their device and with the same bits everywhere."""
        if self.size == 1:
            return values
        return self.gather(values.detach().flatten().cpu()).sum(0).view(values.shape).to(values.device)

    def sum_counts(self, counts: Tensor) -> Tensor:
        """The sum over all ranks of whole numbers, which is exact in whatever order; a device is not waited for."""
        if self.size == 1:
            return counts
        total = counts.clone()
        with self.communicating():
            # Of tensors on a device DeepSpeed's own group takes care.
            dist.all_reduce(total, group=self.group if total.device.type == "cpu" else None)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank gave."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.communicating():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, do: Callable[[], None], what: str) -> None:
        """Let every rank do its part, and go on only if all of them could.

        Raises:
            RanksDisagreeError: in the other ranks, if ``do`` failed in one; there its own exception is raised.
        """
        failure: Exception | None = None
        try:
            do()
        except Exception as error:
            failure = error
        failures = self.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for name, message in zip(self.names, failures, strict=True):
            if message is not None:
                raise RanksDisagreeError(f"{name} could not {what}: {message}")

    def close(self) -> None:
        """Say goodbye to the others and leave the groups."""
        self.lifeline.close()
        self._leave_groups()

    def _leave_groups(self) -> None:
        for group in (self.group, self.publishing_group):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        self.group = self.publishing_group = None


def find_ranks(timeout: float) -> Ranks:
    """The ranks that torch.distributed knows; every rank has to call it.

    Args:
        timeout: seconds after which a rank that is silent, or that others wait for, counts as lost.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return Ranks()
    rank = dist.get_rank()
    # The lifeline names who is missing, well before a collective merely says that it waited.
    patience = timedelta(seconds=2 * timeout + 30)
    group = dist.new_group(backend="gloo", timeout=patience)
    listener = listen() if rank == 0 else None
    facts: list[Any] = [None] * size
    own = {
        "node": node_name(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "cores": sorted(allowed_cores()),
        "port": listener.getsockname()[1] if listener is not None else None,
        "token": secrets.token_hex(16),
    }
    dist.all_gather_object(facts, own, group=group)

    members: dict[str, list[int]] = {}
    for other, fact in enumerate(facts):
        members.setdefault(fact["node"], []).append(other)
    nodes = list(members.values())
    node = members[own["node"]]
    names = [f"rank {i} (host {fact['host']}, process {fact['process']})" for i, fact in enumerate(facts)]
    ranks = Ranks(
        rank=rank,
        size=size,
        nodes=nodes,
        processes=[fact["process"] for fact in facts],
        names=names,
        cores=share_cores(node.index(rank), [set(facts[i]["cores"]) for i in node], Topology.read()),
        group=group,
        lifeline=Lifeline(
            rank,
            names,
            (_address_of(facts[0]["host"], nodes), facts[0]["port"]),
            facts[0]["token"],
            timeout,
            listener=listener,
        ),
    )
    ranks.join_column(patience)
    # A script that ends without destroying its engine must not leave their threads to the interpreter's end.
    atexit.register(_leave_groups_of, weakref.ref(ranks))
    return ranks


def _leave_groups_of(ranks: weakref.ref[Ranks]) -> None:
    alive = ranks()
    if alive is not None:
        alive._leave_groups()


def node_name() -> str:
    """What processes that can share memory have in common: the machine's boot, the container's processes, the host."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if Path(path).is_symlink() else Path(path).read_text().strip())
        except OSError:
            continue
    return "/".join(parts)


def _address_of(host_of_rank_0: str, nodes: list[list[int]]) -> str:
    # Launchers start rank 0 on the host that all ranks have met at.
    return "127.0.0.1" if len(nodes) == 1 else os.environ.get("MASTER_ADDR") or host_of_rank_0
