"""What a step's exchange costs with up to 1,024 ranks, from constants that are measured with a few.

All ranks of a node share one compute copy; touched rows per rank stay the same (weak scaling). Nothing here has been
measured with more ranks than there are on this machine: it is arithmetic over the messages that the code sends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from ranks_cases import Shape

from meft_engine.planner.network import ID_BYTES, Load

RANKS = tuple(2**i for i in range(11))

# Of a cluster, stated and not measured: a network of 200 Gbit/s for each node, and what a message takes through it.
NETWORK_BANDWIDTH, NETWORK_LATENCY = 25e9, 5e-6


@dataclass(frozen=True)
class Constants:
    """Seconds that things take a rank that has a core of its own."""

    collective: float
    """An all_to_all, however little it sends."""
    message: float
    """One more rank to exchange with, in an all_to_all."""
    byte: float
    """A byte sent, and one received meanwhile, in an all_to_all."""
    ring_step: float
    """One of the steps of a small all_gather."""
    handled_table: float = 0.0
    """A table whose touched rows are exchanged, however few."""
    handled_byte: float = 0.0
    """A byte of touched rows to sort, pack, unpack, add up and square."""
    reduced_byte: float = 0.0
    """A byte sent in a ring all-reduce, with what it takes to add up the one that comes."""
    network: float = math.inf
    """Bytes per second into and out of a node."""
    latency: float = 0.0
    """Of a message between nodes, beside what the above includes."""

    def on_cluster(self) -> Constants:
        """The same software, with a network between nodes."""
        return replace(self, network=NETWORK_BANDWIDTH, latency=NETWORK_LATENCY)


def load(shape: Shape, ranks: int, percent: float, overlap: str, **options: int) -> Load:
    """The load where every rank touches so much of every table."""
    touched = shape.rows * percent / 100
    share = min(1.0, {"equal": percent / 100, "disjoint": ranks * percent / 100}.get(overlap, 0.0))
    if overlap == "random":
        share = 1 - (1 - percent / 100) ** ranks
    return Load(shape, ranks, touched, shape.rows * share, **options)


def exchange_seconds(c: Constants, load: Load) -> dict[str, float]:
    """Seconds of a step by what they go to; ``exchange`` is all but ``publication``."""
    if load.ranks == 1:
        return dict.fromkeys(("counts", "facts", "gradients", "handling", "exchange", "publication"), 0.0)
    start, ring = _all_to_all_of_nothing(c, load, load.ranks), _ring_of_nothing(c, load)
    row = ID_BYTES + load.shape.width * load.wire_bytes
    members = load.ranks / load.nodes
    # Bytes out of a node for one that a rank sends: those of all its ranks, as far as they go to other nodes.
    crossing = members * (load.ranks - members) / (load.ranks - 1)
    parts = {
        "counts": start + load.fact_bytes / 3 * c.byte,
        "facts": 2 * ring + 2 * load.fact_bytes / 3 * c.byte,
        "gradients": load.buckets * start + load.gradient_bytes * max(c.byte, crossing / c.network),
        "handling": load.shape.tables * (c.handled_table + load.touched * row * c.handled_byte),
    }
    published = load.rounds * _all_to_all_of_nothing(c, load, load.nodes)
    published += load.published_bytes * max(c.byte + c.handled_byte, members / c.network)
    return {**parts, "exchange": sum(parts.values()), "publication": published}


def message_seconds(c: Constants, load: Load) -> float:
    """The part of the above that there would be if messages were empty."""
    if load.ranks == 1:
        return 0.0
    gradients = (1 + load.buckets) * _all_to_all_of_nothing(c, load, load.ranks)
    return gradients + load.rounds * _all_to_all_of_nothing(c, load, load.nodes) + 2 * _ring_of_nothing(c, load)


def network_seconds(c: Constants, load: Load) -> float:
    """The part that only the network between nodes sets: its bytes and the latency of collectives; 0 within a node."""
    if load.nodes == 1:
        return 0.0
    return load.network_bytes / c.network + (1 + load.buckets + load.rounds + 2 * (load.ranks - 1)) * c.latency


def _all_to_all_of_nothing(c: Constants, load: Load, members: int) -> float:
    return c.collective + (members - 1) * c.message + (c.latency if load.nodes > 1 else 0.0)


def _ring_of_nothing(c: Constants, load: Load) -> float:
    return (load.ranks - 1) * (c.ring_step + (c.latency if load.nodes > 1 else 0.0))


def dense_seconds(c: Constants, load: Load) -> float:
    """Of a ring all-reduce by the same software."""
    return _ring_all_reduce(load, c.ring_step + (c.latency if load.nodes > 1 else 0.0), c.reduced_byte, c.network)


def dense_network_seconds(c: Constants, load: Load) -> float:
    """Of a ring all-reduce that costs no more than the network between nodes; 0 within a node."""
    return _ring_all_reduce(load, c.latency, 0.0, c.network) if load.nodes > 1 else 0.0


def _ring_all_reduce(load: Load, step: float, byte: float, network: float) -> float:
    # One edge of the ring leaves each node, so that a node's network carries what one rank sends.
    slowest = max(byte, 1 / network if load.nodes > 1 else 0.0)
    return 2 * (load.ranks - 1) * step + load.dense_bytes * slowest


def table(constants: dict[str, Constants], shape: Shape, percents: Sequence[float]) -> list[dict[str, Any]]:
    """One line for each set of constants, touched share, overlap, precision on the wire and number of ranks."""
    lines = []
    kinds = itertools.product(percents, ("random", "equal"), (4, 2))
    for (name, c), (percent, overlap, wire) in itertools.product(constants.items(), kinds):
        for ranks in RANKS:
            found = load(shape, ranks, percent, overlap, wire_bytes=wire)
            seconds = exchange_seconds(c, found)
            lines.append(
                {
                    **{"constants": name, "ranks": ranks, "nodes": found.nodes, "touched_percent": percent},
                    **{
                        "overlap": overlap,
                        "wire": {4: "fp32", 2: "bf16"}[wire],
                        "union_share": found.union / shape.rows,
                    },
                    **{f"{part}_seconds": value for part, value in seconds.items() if part != "exchange"},
                    "seconds": seconds["exchange"] + seconds["publication"],
                    "message_seconds": message_seconds(c, found),
                    "network_seconds": network_seconds(c, found),
                    "dense_seconds": dense_seconds(c, found),
                    "dense_network_seconds": dense_network_seconds(c, found),
                    **{
                        "bytes": found.bytes,
                        "published_bytes": found.published_bytes,
                        "dense_bytes": found.dense_bytes,
                    },
                    "network_bytes_of_node": found.network_bytes,
                    "dense_network_bytes_of_node": found.dense_bytes if found.nodes > 1 else 0.0,
                }
            )
    return lines


def gain_ends(lines: Sequence[dict[str, Any]], column: str) -> int | None:
    """The fewest ranks from which on the dense all-reduce is as fast, by the seconds in ``column`` and its like.

    ``None`` if the exchange is faster with the most ranks.
    """
    ends = None
    for line in sorted(lines, key=lambda line: line["ranks"]):
        dense = line[f"dense_{column}"]
        if line["ranks"] == 1 or not dense:
            continue
        if dense > line[column]:
            ends = None
        elif ends is None:
            ends = line["ranks"]
    return ends


# Constants from what was measured


@dataclass(frozen=True)
class Point:
    """A collective that was timed: of so many ranks on so many cores, with bytes from each rank to each other."""

    kind: str
    ranks: int
    peer_bytes: int
    seconds: float


def crowd(ranks: int, cores: int) -> float:
    """How many ranks share a core: by so much everything takes longer that is a core's work."""
    return max(1.0, ranks / cores)


def fit(points: Sequence[Point], cores: int) -> tuple[Constants, float]:
    """Constants of collectives, and by what part the fitted times are off (the root of the mean square)."""
    spread = [point for point in points if point.kind == "all_to_all"]
    seconds = np.array([point.seconds / crowd(point.ranks, cores) for point in spread])
    others = np.array([point.ranks - 1 for point in spread], dtype=float)
    columns = np.stack([np.ones_like(others), others, others * [point.peer_bytes for point in spread]], axis=1)
    found, off = _non_negative(columns / seconds[:, None], np.ones_like(seconds))
    ring = [point for point in points if point.kind == "all_gather"]
    step = float(np.median([point.seconds / crowd(point.ranks, cores) / (point.ranks - 1) for point in ring]))
    return Constants(*(float(value) for value in found), ring_step=step), off


def _non_negative(columns: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """The best factors that are not negative, of few columns, and the root of the mean square of what is left."""
    best, least = np.zeros(columns.shape[1]), math.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            part = columns[:, chosen]
            scale = np.linalg.norm(part, axis=0)
            factors = np.linalg.lstsq(part / scale, wanted, rcond=None)[0] / scale
            rest = float(np.sqrt(np.mean((part @ factors - wanted) ** 2)))
            if (factors >= 0).all() and rest < least:
                best, least = np.zeros(columns.shape[1]), rest
                best[list(chosen)] = factors
    return best, least


def with_handling(c: Constants, measured: Sequence[tuple[Load, float]], cores: int) -> Constants:
    """What of measured exchanges their collectives do not explain, by the table and by the byte of touched rows."""
    columns, wanted = [], []
    for found, seconds in measured:
        alone = seconds / crowd(found.ranks, cores)
        explained = exchange_seconds(replace(c, handled_table=0.0, handled_byte=0.0), found)["exchange"]
        row = ID_BYTES + found.shape.width * found.wire_bytes
        columns.append([found.shape.tables / alone, found.shape.tables * found.touched * row / alone])
        wanted.append(max(0.0, alone - explained) / alone)
    (of_table, of_byte), _ = _non_negative(np.array(columns), np.array(wanted))
    return replace(c, handled_table=float(of_table), handled_byte=float(of_byte))


def with_reduction(c: Constants, measured: Sequence[tuple[Load, float]], cores: int) -> Constants:
    """The cost of a byte in measured all-reduces of dense gradients."""
    found = [
        (seconds / crowd(of.ranks, cores) - 2 * (of.ranks - 1) * c.ring_step) / of.dense_bytes
        for of, seconds in measured
    ]
    return replace(c, reduced_byte=max(0.0, float(np.median(found))))


def rounded(c: Constants) -> dict[str, float]:
    """For the last line."""
    found = {}
    for name, value in asdict(c).items():
        if name not in ("network", "latency"):
            unit, factor = ("ns", 1e9) if name.endswith("byte") else ("us", 1e6)
            found[f"{name}_{unit}"] = round(value * factor, 4)
    return found
