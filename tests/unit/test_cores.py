"""How the ranks of a host divide its cores, on machines that are made up and on this one."""

from __future__ import annotations

import itertools
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_engine.cores import CoreShare, Topology, allowed_cores, claim_cores, rank_cores, share_cores


def machine(*physical_cores: int, threads: int = 1) -> Topology:
    """NUMA nodes of so many physical cores each, numbered as Linux does: the first threads of all, then the second."""
    node_of = [node for node, count in enumerate(physical_cores) for _ in range(count)]
    cores = range(len(node_of) * threads)
    return Topology(
        {core: core % len(node_of) for core in cores}, {core: node_of[core % len(node_of)] for core in cores}
    )


def divide(allowed: list[set[int]], topology: Topology) -> list[set[int]]:
    return [set(share_cores(rank, allowed, topology).cores) for rank in range(len(allowed))]


def shared(ranks: int, topology: Topology) -> list[set[int]]:
    """The shares of ranks that may all use the whole machine."""
    return divide([set(topology.nodes)] * ranks, topology)


def disjoint(shares: list[set[int]]) -> bool:
    return all(one.isdisjoint(other) for one, other in itertools.combinations(shares, 2))


def nodes_of(cores: set[int], topology: Topology) -> set[int]:
    return {topology.nodes[core] for core in cores}


def cores(*ranges: tuple[int, int]) -> set[int]:
    return {core for first, last in ranges for core in range(first, last + 1)}


# Examples: what every rank gets

ONE_NODE = machine(8, threads=2)  # hyperthreads of core c: c and c + 8
TWO_NODES = machine(8, 8, threads=2)  # of core c: c and c + 16; node 1 begins at 8
QUARTERS = [cores((0, 3), (16, 19)), cores((4, 7), (20, 23)), cores((8, 11), (24, 27)), cores((12, 15), (28, 31))]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (ONE_NODE, [cores((0, 15))]),
        (ONE_NODE, [cores((0, 3), (8, 11)), cores((4, 7), (12, 15))]),
        (ONE_NODE, [{first, first + 1, first + 8, first + 9} for first in (0, 2, 4, 6)]),
        (ONE_NODE, [{core, core + 8} for core in range(8)]),
        (TWO_NODES, [cores((0, 31))]),
        (TWO_NODES, [cores((0, 7), (16, 23)), cores((8, 15), (24, 31))]),
        # A rank does not cross nodes so that all get equally much.
        (TWO_NODES, [*QUARTERS[:2], QUARTERS[2] | QUARTERS[3]]),
        (TWO_NODES, QUARTERS),
        (TWO_NODES, [{first, first + 1, first + 16, first + 17} for first in range(0, 16, 2)]),
        # Fewer ranks than nodes: whole nodes.
        (machine(2, 2, 2, 2), [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (Topology({}, {core: core % 4 for core in range(8)}), [{0, 4, 1, 5}, {2, 6, 3, 7}]),
        # In proportion to the cores of the nodes; a node of less than half a share stays unused.
        (machine(6, 2), [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (machine(8, 4), [cores((0, 7)), cores((8, 11))]),
        (machine(8, 3), [cores((0, 7)), cores((8, 10))]),
        (machine(9, 3), [cores((0, 8)), cores((9, 11))]),
        (machine(8, 1), [cores((0, 3)), cores((4, 7))]),
        # Fewer physical cores than ranks: hyperthreads; fewer of those too: one each, in turn.
        (machine(2, threads=2), [{0}, {2}, {1}, {3}]),
        (machine(1, 1, threads=2), [{0}, {2}, {1}, {3}]),
        (machine(2), [{0}, {1}, {0}, {1}, {0}]),
    ],
)
def test_ranks_that_may_use_the_same_cores_divide_them(topology, expected):
    assert shared(len(expected), topology) == expected


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        # Bound: kept, however unequal, and though a physical core is torn apart.
        ([{0, 1, 2}, {3}, {8, 11}], [{0, 1, 2}, {3}, {8, 11}]),
        # Two ranks to each GPU's node.
        ([cores((0, 3)), cores((4, 7))] * 2, [{0, 1}, {4, 5}, {2, 3}, {6, 7}]),
        # One bound, two not.
        ([cores((0, 3)), {4}, cores((0, 3))], [{0, 1}, {4}, {2, 3}]),
        # Overlapping: nobody gets what it may not use.
        ([cores((0, 3)), cores((2, 5))], [{0, 1, 2}, {3, 4, 5}]),
        ([cores((0, 7)), {0, 1}], [cores((2, 7)), {0, 1}]),
        ([{0, 1}, cores((0, 5)), cores((0, 5))], [{0, 1}, {2, 3}, {4, 5}]),
        # A set counts as often as ranks have it.
        ([cores((0, 7))] + [cores((0, 8))] * 3, [{0, 3, 7}, {1, 8}, {2, 4}, {5, 6}]),
        # The smaller set has no core to spare.
        ([{0, 1}, {0}, {1, 2}], [{1}, {0}, {2}]),
        ([cores((0, 1)), {0}], [{1}, {0}]),
        ([{1}, {0}, {0, 1}], [{1}, {0}, {0, 1}]),
    ],
)
def test_ranks_with_sets_of_their_own(allowed, expected):
    assert divide(allowed, ONE_NODE) == expected


def test_hyperthreads_stay_together_where_sets_overlap():
    topology = machine(4, threads=2)
    for mine in divide([set(range(8)), set(range(8)) - {0}], topology):
        assert {core for core in topology.nodes if topology.physical[core] in mine} - {0, 4} == mine - {0, 4}


# What holds on any machine

machines = st.builds(
    lambda nodes, threads: machine(*nodes, threads=threads),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 2),
)


@given(machines, st.integers(1, 12))
def test_shares_of_a_whole_machine(topology, ranks):
    shares = shared(ranks, topology)
    everything, physical = set(topology.nodes), set(topology.physical.values())
    all_nodes = nodes_of(everything, topology)
    assert len(shares) == ranks and all(shares)
    if ranks > len(everything):
        assert all(len(share) == 1 for share in shares)
        uses = [sum(core in share for share in shares) for core in everything]
        assert max(uses) - min(uses) <= 1
        return
    assert disjoint(shares)
    units = shares
    if ranks <= len(physical):
        units = [{topology.physical[core] for core in share} for share in shares]
        assert disjoint(units)
    sizes = [len(unit) for unit in units]
    nodes = [nodes_of(share, topology) for share in shares]
    if ranks < len(all_nodes):
        assert max(sizes) - min(sizes) <= 1
        assert set().union(*shares) == everything
    else:
        assert all(len(on) == 1 for on in nodes)
        for node in all_nodes:
            on_node = [size for size, on in zip(sizes, nodes, strict=True) if on == {node}]
            there = {core for core in everything if topology.nodes[core] == node}
            if on_node:
                assert max(on_node) - min(on_node) <= 1
                assert there <= set().union(*shares)
            else:  # smaller than the share of any rank
                wholes = there if ranks > len(physical) else {topology.physical[core] for core in there}
                assert len(wholes) <= min(sizes)


@given(machines, st.data())
def test_shares_of_any_sets(topology, data):
    some_cores = st.sets(st.sampled_from(sorted(topology.nodes)), min_size=1)
    sets = data.draw(st.lists(some_cores, min_size=1, max_size=3))
    allowed = data.draw(st.lists(st.sampled_from(sets), min_size=1, max_size=6))
    shares = divide(allowed, topology)
    assert shares == divide(allowed, topology)
    for rank, share in enumerate(shares):
        assert share and share <= allowed[rank]
        others = [other for index, other in enumerate(allowed) if index != rank]
        if all(other.isdisjoint(allowed[rank]) for other in others):
            assert share == allowed[rank]
    if len({frozenset(each) for each in allowed}) == 1 and len(allowed[0]) >= len(allowed):
        assert disjoint(shares)


@given(machines.filter(lambda topology: len(topology.nodes) > 1), st.data())
def test_sets_of_which_one_lies_in_the_other_leave_no_core_unused(topology, data):
    outer = set(topology.nodes)
    inner = data.draw(st.sets(st.sampled_from(sorted(outer)), min_size=1).filter(lambda cores: cores < outer))
    shares = divide([inner, outer], topology)
    assert disjoint(shares) and set().union(*shares) == outer


# The sentence


@pytest.mark.parametrize(
    ("rank", "allowed", "topology", "place", "reason"),
    [
        (0, [set(range(16))], ONE_NODE, "cores 0-15 of NUMA node 0", "all that this process may use"),
        (1, [{0}, {2, 4, 5}], ONE_NODE, "cores 2,4-5 of NUMA node 0", "to which the launcher has bound this rank"),
        (
            3,
            [set(range(32))] * 4,
            TWO_NODES,
            "cores 12-15,28-31 of NUMA node 1",
            "its part of the 32 that 4 ranks of this host may use",
        ),
        (
            0,
            [set(range(8))] * 2,
            machine(2, 2, 2, 2),
            "cores 0-3 of NUMA nodes 0-1",
            "its part of the 8 that 2 ranks of this host may use",
        ),
        (
            2,
            [{0, 1}] * 5,
            machine(2),
            "core 0 of NUMA node 0",
            "which 3 ranks of this host share for want of others",
        ),
    ],
)
def test_the_sentence_says_what_was_chosen_and_why(rank, allowed, topology, place, reason):
    sentence = share_cores(rank, allowed, topology).sentence
    assert sentence == f"rank {rank} of this host updates its rows on {place}, {reason}"


# Topologies that are read


def test_topology_is_read_from_the_kernel(tmp_path: Path):
    count = psutil.cpu_count()
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
    for core, text in siblings.items():
        (tmp_path / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(text + "\n")
    for node, text in {0: "0-1,4-5", 1: "2-3,6-7", 2: ""}.items():  # node 2 is memory without cores
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(text + "\n")
    found, expected = Topology.read(tmp_path), machine(2, 2, threads=2)
    assert {core: found.place(core) for core in range(8)} == {core: expected.place(core) for core in range(8)}
    assert set(found.nodes) == set(found.physical) == set(range(max(8, count)))


def test_without_the_kernels_files_each_core_stands_alone_on_one_node(tmp_path: Path):
    count = psutil.cpu_count()
    assert Topology.read(tmp_path) == Topology({core: core for core in range(count)}, dict.fromkeys(range(count), 0))
    (tmp_path / "node/node0").mkdir(parents=True)
    (tmp_path / "node/node0/cpulist").write_text("not a list")
    assert Topology.read(tmp_path).place(count - 1) == (0, count - 1)


def test_a_core_that_is_not_in_the_topology_can_be_used():
    assert machine(2).place(70) == (0, 70)
    assert divide([{70, 71}] * 2, machine(2)) == [{70}, {71}]


def test_this_machine():
    mine, topology = allowed_cores(), Topology.read()
    assert mine <= set(topology.nodes) == set(topology.physical)
    alone = share_cores(0, [mine], topology)
    assert alone.cores == mine and alone.sentence.endswith("all that this process may use")
    assert isinstance(alone, CoreShare)
    shares = divide([mine] * len(mine), topology)
    assert disjoint(shares) and set().union(*shares) == mine


def test_a_claimed_share_takes_the_place_of_all_cores():
    one = frozenset({min(allowed_cores())})
    try:
        claim_cores(one)
        assert rank_cores() == one and allowed_cores() >= one
    finally:
        claim_cores(None)
    assert rank_cores() == allowed_cores()
