"""What some ranks saved under one ZeRO stage goes on with any other number of ranks under any other stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engines import largest_difference
from tests.ranks import elastic, member
from tests.ranks.worlds import start_world, wait_for_world

# Ranks and stage of the save, ranks and stage of the resume, the optimizer's mode, whether saved in the background.
WAYS = [
    (2, 2, 1, 0, "lazy", False),
    *(
        pytest.param(*way, marks=pytest.mark.ranks)
        for way in (
            (1, 0, 2, 2, "dense_equivalent", True),
            (1, 3, 4, 1, "lazy", False),
            (4, 1, 1, 3, "dense_equivalent", False),
            (2, 2, 4, 3, "lazy", True),
            (4, 3, 2, 2, "lazy", True),
            (4, 2, 2, 2, "dense_equivalent", True),
        )
    ),
]


def world(folder: Path, ranks: int, *arguments: str) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_world(folder, start_world(folder, ranks, ["-m", "tests.ranks.elastic", str(folder), *arguments]), 200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def through() -> dict[str, dict[str, Any]]:
    """One rank, never interrupted, by mode; in the process of the test."""
    return {mode: elastic.run(0, 1, 0, mode, False, "through", Path()) for mode in ("lazy", "dense_equivalent")}


@pytest.mark.parametrize(("ranks", "stage", "later_ranks", "later_stage", "mode", "background"), WAYS)
def test_it_goes_on_as_if_nothing_had_changed(
    ranks, stage, later_ranks, later_stage, mode, background, through, tmp_path
):
    expected, checkpoint = through[mode], str(tmp_path / "checkpoint")
    how = "background" if background else "at once"
    before = world(tmp_path / "save", ranks, str(stage), mode, how, "save", checkpoint)
    if later_ranks == 1 and later_stage == 0:
        after = [elastic.run(0, 1, 0, mode, False, "resume", Path(checkpoint))]
    else:
        after = world(tmp_path / "resume", later_ranks, str(later_stage), mode, how, "resume", checkpoint)
    losses = [
        sum(one) / len(ranks_) for ranks_ in (before, after) for one in zip(*(p["losses"] for p in ranks_), strict=True)
    ]
    assert losses == pytest.approx(expected["losses"], abs=1e-6)
    assert after[0]["lr"] == pytest.approx(expected["lr"], rel=1e-12)
    for kind in ("rows", "state"):
        found, own = member.whole([part[kind] for part in after]), member.whole([expected[kind]])
        assert largest_difference(found, own) < 1e-6
    assert largest_difference(after[0]["routers"], expected["routers"]) < 1e-6
    # The second half must train, or equality would say nothing.
    saved = member.whole([part["rows"] for part in before])
    assert largest_difference(saved, member.whole([expected["rows"]])) > 1e-3
