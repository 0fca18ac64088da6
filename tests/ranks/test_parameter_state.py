"""What trains beside the rows goes on with another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engines import differing, largest_difference
from tests.ranks import member, parameters
from tests.ranks.parameters import STEPS, Leg
from tests.ranks.worlds import start_world, wait_for_world


def world(folder: Path, ranks: int, legs: list[Leg]) -> dict[str, list[dict[str, Any]]]:
    """Runs legs in a world of some ranks; of each, what every rank found."""
    parameters.write(legs, folder)
    wait_for_world(folder, start_world(folder, ranks, ["-m", "tests.ranks.parameters", str(folder)]), 400)
    return {leg.name: [torch.load(folder / f"{leg.name}.{rank}.pt") for rank in range(ranks)] for leg in legs}


def check(parts: list[dict[str, Any]], through: dict[str, Any]) -> None:
    """The ranks have come to what one rank came to without an interruption."""
    losses = torch.tensor([part["losses"] for part in parts]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(through["losses"])[-STEPS:], rtol=0, atol=1e-5)
    assert largest_difference(parts[0]["parameters"], through["parameters"]) < 1e-5
    assert all(not part["parameters"] for part in parts[1:])
    rows = member.whole([part["rows"] for part in parts])
    assert largest_difference(rows, member.whole([through["rows"]])) < 1e-5
    for part in parts:
        assert differing(part["compute"], parts[0]["compute"]) == []
        assert part["progress"] == through["progress"]


def test_two_ranks_hand_over_to_one(tmp_path):
    saved = str(tmp_path / "saved")
    world(tmp_path / "2", 2, [Leg("first", stage=3, save=saved)])
    through = parameters.run(Leg("", stage=0, steps=2 * STEPS), 0, 1)
    check([parameters.run(Leg("", stage=0, start=STEPS, load=saved), 0, 1)], through)


CHAINS = {"1": (1, 1, 1), "2": (2, 2, 2), "3": (3, 3, 3), "0 2 3": (0, 2, 3), "3 0 1": (3, 0, 1), "1 3 0": (1, 3, 0)}
"""Stages with two ranks, then with one, then with two again."""
GATES = {name: "none" if name in ("2", "3 0 1", "1 3 0") else "softmax" for name in CHAINS}
"""With "none", a single number is trained beside the rows, of which the second rank has nothing."""


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What every chain comes to in its last leg."""
    folder = tmp_path_factory.mktemp("chains")
    saved = {name: [str(folder / name / end) for end in ("two", "one")] for name in CHAINS}

    def leg(name: str, index: int) -> Leg:
        load = saved[name][index - 1] if index else None
        save = saved[name][index] if index < 2 else None
        return Leg(name, CHAINS[name][index], start=index * STEPS, load=load, save=save, gate=GATES[name])

    world(folder / "first", 2, [leg(name, 0) for name in CHAINS])
    for name in CHAINS:
        parameters.run(leg(name, 1), 0, 1)
    return world(folder / "last", 2, [leg(name, 2) for name in CHAINS])


@pytest.fixture(scope="module")
def through() -> dict[str, dict[str, Any]]:
    """One rank that is not interrupted, by gate."""
    return {gate: parameters.run(Leg("", stage=0, steps=3 * STEPS, gate=gate), 0, 1) for gate in set(GATES.values())}


@pytest.mark.ranks
@pytest.mark.parametrize("name", CHAINS)
def test_two_ranks_then_one_then_two(name, chains, through):
    check(chains[name], through[GATES[name]])


@pytest.mark.ranks
def test_three_ranks_take_over_in_bf16(tmp_path):
    """Every rank compares what it takes over with what was captured."""
    saved = str(tmp_path / "saved")
    world(tmp_path / "2", 2, [Leg("first", stage=2, bf16=True, save=saved)])
    legs = [Leg(str(stage), stage=stage, bf16=True, load=saved, steps=0, trained_before=True) for stage in (1, 3)]
    for parts in world(tmp_path / "3", 3, legs).values():
        assert all(differing(part["compute"], parts[0]["compute"]) == [] for part in parts)
