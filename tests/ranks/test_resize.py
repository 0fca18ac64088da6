"""A checkpoint of two ranks is given more rows, and both go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meft_engine.checkpoint.resize import grow
from tests.integration.engines import differing
from tests.ranks import member
from tests.ranks.cases import model
from tests.ranks.worlds import start_world, wait_for_world

ROWS, MORE, EXPERTS = 120, 180, 12


def world(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs ``tests.ranks.resized`` in a world of two ranks; what each of them found."""
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_world(folder, start_world(folder, 2, ["-m", "tests.ranks.resized", str(folder), *arguments]), 200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_go_on_with_more_rows(tmp_path):
    checkpoint, wider = tmp_path / "checkpoint", tmp_path / "wider"
    before = world(tmp_path / "save", "save", str(ROWS), str(checkpoint))
    grow(model(), checkpoint, wider, MORE)
    after = world(tmp_path / "resume", "resume", str(MORE), str(wider))
    for one, other in zip(before, after, strict=True):
        assert one["drawn"] == other["drawn"], "the random state of a rank was not restored"
        assert differing(one["routers"], other["routers"]) == []
    assert before[0]["drawn"] != before[1]["drawn"]
    for kind in ("rows", "moments"):
        old, new = (member.whole([part[kind] for part in parts]) for parts in (before, after))
        kept = {name: t.view(EXPERTS, 15, *t.shape[1:])[:, :10].flatten(0, 1) for name, t in new.items()}
        assert differing(old, kept) == []
    later = member.whole([part["later"] for part in after])
    learned = [t.view(EXPERTS, 15)[:, 10:] for name, t in later.items() if name.endswith("/step")]
    # Of each rank's experts.
    assert learned and all(bool(steps[:6].any()) and bool(steps[6:].any()) for steps in learned)
