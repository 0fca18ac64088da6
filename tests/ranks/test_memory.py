"""However many ranks a node has, it holds one adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks.holder import LAYERS, ROWS, WIDTH
from tests.ranks.worlds import start_world, wait_for_world

pytestmark = pytest.mark.ranks


def held(folder: Path, ranks: int, mode: str) -> list[dict[str, int]]:
    wait_for_world(folder, start_world(folder, ranks, ["-m", "tests.ranks.holder", str(folder), mode]), 200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
def test_four_ranks_of_a_node_hold_what_one_holds(mode, tmp_path):
    alone, together = held(tmp_path / "1", 1, mode), held(tmp_path / "4", 4, mode)
    elements = 2 * LAYERS * ROWS * WIDTH
    expected = elements * (2 + 2 + 4 + 4) + 2 * LAYERS * ROWS * 4
    one, four = (sum(rank["memory"] for rank in found) for found in (alone, together))
    assert expected <= one <= 1.03 * expected
    assert 0.999 * expected <= four <= 1.05 * one  # shared pages are counted in whole KiB
    for found in (alone, together):
        assert sum(rank["said"] for rank in found) == pytest.approx(expected, rel=1e-3)
    # Nobody holds much more than a fourth.
    assert max(rank["memory"] for rank in together) <= 0.3 * one
