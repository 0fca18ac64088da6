"""Several ranks train what one rank trains with all of their data in its batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.integration.engines import largest_difference
from tests.ranks import member
from tests.ranks.cases import SEQUENCES, Case
from tests.ranks.worlds import run_cases

TOUCHED = ["overlapping", "equal", "disjoint", "empty"]
STAGES = [0, 1, 2, 3]
MODES = ["lazy", "dense_equivalent"]


def matrix() -> list[Case]:
    """Every pair of a stage, a mode, overlap on or off, and a kind of touched rows."""
    cases = []
    for stage, (place, touched) in itertools.product(STAGES, enumerate(TOUCHED)):
        mode = MODES[(stage + place) % 2]
        overlap = (stage // 2 + place // 2 + stage + place) % 2 == 0 if touched != "equal" else stage % 2 == 0
        cases.append(Case(f"{stage}-{mode}-{overlap}-{touched}", touched, stage, mode, overlap))
    return cases


FEW = [
    Case("few-plain", steps=8, accumulation=2),
    Case("few-empty", "empty", stage=2, mode="dense_equivalent", steps=8),
    Case("few-disjoint", "disjoint", stage=3, overlap=False, steps=8),
    Case("few-idle", "idle", steps=8),
    Case("few-nodes", stage=1, steps=8, nodes=[[0], [1]], bf16=True),
]
BALANCED = {"router": {"balance": "loss", "balance_coef": 0.05}}
BIASED = {"router": {"balance": "bias", "balance_coef": 0.01}}


def special(ranks: int) -> list[Case]:
    """What the matrix leaves out: nodes, sums, means over ranks of what is no gradient."""
    apart = [[0], [1]] if ranks == 2 else [[0, 1], [2, 3]]
    found = [
        Case("nodes-lazy", nodes=apart, stage=2),
        Case("nodes-small", nodes=apart, stage=2, small_messages=True, steps=20),
        Case("nodes-dense", nodes=apart, mode="dense_equivalent", touched="empty"),
        Case("nodes-bf16-moments", nodes=apart, sections={"optimizer": {"moments_dtype": "bf16"}}, steps=20),
        Case("accumulated", accumulation=3, stage=2),
        Case("balanced", sections=BALANCED, adapter={"center_inputs": True}, steps=20),
        Case("biased", sections=BIASED, stage=2, steps=20),
        Case("sums", top_level={"gradient_allreduce_op": "sum"}, steps=6),
        Case("prescaled", top_level={"prescale_gradients": True}, steps=10),
        Case("sequence", sequence=2, steps=6),
        Case("sequence-partitioned", sequence=2, stage=2, steps=6),
        Case("predivided", top_level={"gradient_predivide_factor": 2.0 * ranks}, steps=10),
    ]
    if ranks == 4:
        found.append(Case("nodes-uneven", nodes=[[0, 1, 2], [3]], mode="dense_equivalent", steps=20))
        found.append(Case("nodes-three", nodes=[[0], [1, 2], [3]], stage=3, touched="disjoint", steps=20))
    return found


def alone(case: Case, ranks: int) -> dict[str, Any]:
    """The same case by one rank."""
    top_level = {"train_micro_batch_size_per_gpu": SEQUENCES * ranks}
    return member.run(Case(**{**case.as_dict(), "nodes": None, "top_level": top_level}), 0, 1, as_one_of=ranks)


def check(case: Case, found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses, norms, rows, moments and routers of several ranks against those of one."""
    ranks = len(found)
    scale = ranks if case.top_level.get("gradient_allreduce_op") == "sum" else 1
    # Ranks that share a sequence add up to one, whose gradient is the mean over fewer.
    scale *= case.sequence
    losses = [sum(one) / ranks for one in zip(*(part["losses"] for part in found), strict=True)]
    assert losses == pytest.approx(expected["losses"], abs=tolerance)
    assert len(losses) == case.steps and min(losses) < losses[0]
    norms = [norm * scale for norm in expected["norms"]]
    assert all(part["norms"] == found[0]["norms"] for part in found)
    assert found[0]["norms"] == pytest.approx(norms, abs=tolerance * scale, rel=tolerance)
    rows = member.whole([part["rows"] for part in found])
    assert largest_difference(rows, member.whole([expected["rows"]])) < tolerance
    state, alone_state = (member.whole(parts) for parts in ([part["state"] for part in found], [expected["state"]]))
    for name, value in state.items():
        if name.endswith("/step"):
            # A product in bf16 may be rounded otherwise where its batch is larger (as AVX-512 does it), and then a row
            # that ties with another is chosen once more, or once less.
            off = (value - alone_state[name]).abs()
            assert off.max() <= case.bf16 and off.mean() <= 0.05, name
        elif not case.sections.get("optimizer", {}).get("moments_dtype"):
            assert torch.allclose(value, alone_state[name], rtol=1e-3, atol=tolerance), name
    for part in found:
        assert largest_difference(part["routers"], expected["routers"]) < tolerance
        assert part["planes"] == found[0]["planes"], "compute planes differ between ranks"
    assert len(set(found[0]["planes"])) == case.steps, "a step changed no row"


def check_touched(case: Case, found: list[dict[str, Any]]) -> None:
    """The rows that ranks touched are what the case's name says."""
    for step in range(case.steps):
        of_table = zip(*(part["touched"][step].items() for part in found), strict=True)
        sets = [[set(rows) for _, rows in parts] for parts in of_table]
        if case.touched == "equal":
            assert all(one == parts[0] and one for parts in sets for one in parts)
        elif case.touched == "disjoint":
            assert all(not a & b and a for parts in sets for a, b in itertools.combinations(parts, 2))
        elif case.touched == "idle":
            assert all(parts[0] and max(one, default=0) < 120 // len(found) for parts in sets for one in parts)
        elif case.touched == "empty":
            assert all(parts[0] and not any(parts[1:]) for parts in sets)
        else:
            assert any(parts[0] & parts[1] and parts[0] - parts[1] for parts in sets)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    return run_cases(tmp_path_factory.mktemp("few"), 2, FEW, timeout=300)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_few_cases_with_two_ranks(case, few):
    check(case, few[case.name], alone(case, 2), 3e-2 if case.bf16 else 1e-5)
    check_touched(case, few[case.name])


def test_the_matrix_has_every_pair():
    cases = matrix()
    fields = {"touched": TOUCHED, "stage": STAGES, "mode": MODES, "overlap": [True, False]}
    for (one, these), (other, those) in itertools.combinations(fields.items(), 2):
        seen = {(getattr(case, one), getattr(case, other)) for case in cases}
        assert seen == set(itertools.product(these, those)), (one, other)


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """All cases of a world size, in one process group."""
    ranks = request.param
    cases = matrix() + special(ranks) + [repeated(ranks), ROUNDED]
    return ranks, run_cases(tmp_path_factory.mktemp(f"world{ranks}"), ranks, cases)


def repeated(ranks: int) -> Case:
    """A case of the special ones once more."""
    return Case(**{**special(ranks)[0].as_dict(), "name": "again"})


ROUNDED = Case("rounded", sections={"communication": {"dtype": "bf16", "timeout": 60.0}}, steps=20)


@pytest.mark.ranks
@pytest.mark.parametrize("number", range(16))
def test_every_pair_of_settings(world, number):
    ranks, found = world
    case = matrix()[number]
    check(case, found[case.name], alone(case, ranks))
    check_touched(case, found[case.name])


@pytest.mark.ranks
def test_nodes_and_means(world, subtests):
    ranks, found = world
    for case in special(ranks):
        with subtests.test(case.name):
            loose = case.name == "nodes-bf16-moments"
            check(case, found[case.name], alone(case, ranks), 5e-3 if loose else 1e-5)


@pytest.mark.ranks
def test_two_runs_are_equal_bit_for_bit(world):
    ranks, found = world
    first, again = found[special(ranks)[0].name], found["again"]
    for one, other in zip(first, again, strict=True):
        assert one["losses"] == other["losses"] and one["norms"] == other["norms"] and one["planes"] == other["planes"]
        for kind in ("rows", "state"):
            assert all(torch.equal(one[kind][name][1], other[kind][name][1]) for name in one[kind])


@pytest.mark.ranks
def test_gradients_may_travel_in_bf16(world):
    """Rounded on their way, they train nearly the same rows, and every rank the same bits."""
    ranks, found = world
    parts = found[ROUNDED.name]
    exact = alone(ROUNDED, ranks)
    check(ROUNDED, parts, exact, tolerance=2e-2)
    rows = member.whole([part["rows"] for part in parts])
    assert largest_difference(rows, member.whole([exact["rows"]])) > 1e-4


@pytest.mark.ranks
def test_only_touched_rows_are_sent(world):
    """The bytes of a whole run, against ids and gradients of what each rank touched of others' rows."""
    from meft_engine.parallel.sharding import owned_rows

    ranks, found = world
    case = next(case for case in matrix() if case.touched == "overlapping" and case.stage == 0)
    parts = owned_rows(120, 10, ranks)
    for rank, part in enumerate(found[case.name]):
        foreign = sum(
            not parts[rank].start <= row < parts[rank].stop
            for step in part["touched"]
            for rows in step.values()
            for row in rows
        )
        least = foreign * (4 + 32 * 4)
        assert least <= part["bytes_sent"] <= 1.25 * least  # counts weigh more beside rows this narrow
