"""Two ranks that share a node and its pinned rows train on one card what one rank trains there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.cases import Case
from tests.ranks.test_parity import alone, check, check_touched
from tests.ranks.worlds import run_cases

CASES = [
    Case("plain", steps=8, accumulation=2, adapter={"center_inputs": True}),
    Case("dense", "empty", mode="dense_equivalent", steps=8),
    Case("now", "disjoint", overlap=False, steps=8),
    Case("nodes", steps=8, nodes=[[0], [1]]),
    Case("biased", steps=8, sections={"router": {"balance": "bias", "balance_coef": 0.01}}),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    # Both ranks compute on the first card, which NCCL refuses and gloo does not.
    return run_cases(tmp_path_factory.mktemp("ranks"), 2, CASES, timeout=300, DS_ACCELERATOR="cuda", LOCAL_RANK="0")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_on_one_card_train_what_one_trains(case, found):
    check(case, found[case.name], alone(case, 2))
    check_touched(case, found[case.name])
    for part in found[case.name]:
        assert part["devices"] == {"keys": "cuda", "values": "cpu"}
        assert part["resident_equals_host"]
