"""A checkpoint of some ranks goes on with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meft_engine import run_log
from tests.integration.engines import differing
from tests.ranks import saving
from tests.ranks.worlds import start_world, wait_for_world

STEPS = 4


def world(folder: Path, ranks: int, *arguments: str) -> list[dict]:
    """Runs ``tests.ranks.saving`` in a world of some ranks; what each of them found."""
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_world(folder, start_world(folder, ranks, ["-m", "tests.ranks.saving", str(folder), *arguments]), 200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module", params=["lazy", pytest.param("dense_equivalent", marks=pytest.mark.ranks)])
def saved(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    """Two ranks train, save after some steps and go on."""
    folder = tmp_path_factory.mktemp(f"saved-{request.param}")
    checkpoint = folder / "checkpoint"
    return request.param, checkpoint, world(folder / "2", 2, request.param, "save", str(checkpoint))


def test_rank_0_alone_keeps_the_log(saved):
    mode, checkpoint, _ = saved
    records = run_log.read(checkpoint.parent / "2" / "run")
    # Where it goes back to the checkpoint, the log goes on in steps that follow.
    assert [r["step"] for r in records if r["kind"] == "step"] == [2, 4, 6, 8]
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, STEPS]
    start, memory = records[0], next(r for r in records if r["kind"] == "memory")
    assert start["ranks"] == 2
    planned = {kind: count / 2 for kind, count in start["planned"]["host"].items()}
    assert memory["host"] == pytest.approx(planned, rel=0.05), "a rank's part of what its node holds"
    layers = next(r for r in records if r["kind"] == "layers")
    if mode == "lazy":
        assert [sum(of_layer) for of_layer in layers["updates"]] == [60, 60], "the rows that rank 0 owns"


def test_the_same_ranks_go_on_bit_for_bit(saved, tmp_path):
    mode, checkpoint, before = saved
    after = world(tmp_path, 2, mode, "resume", str(checkpoint))
    for one, other in zip(before, after, strict=True):
        assert one["losses"][STEPS:] == other["losses"]
        assert one["drawn"] == other["drawn"], "the random state of a rank was not restored"
        assert differing(one["state"], other["state"]) == []
    assert before[0]["drawn"] != before[1]["drawn"]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_takes_over_every_row(ranks, saved, tmp_path):
    mode, checkpoint, before = saved
    after = world(tmp_path, ranks, mode, "inspect", str(checkpoint))
    for kind in ("rows", "moments"):
        assert differing(saving.whole(before, f"saved_{kind}"), saving.whole(after, f"saved_{kind}")) == []


def test_one_rank_loads_what_two_have_saved(saved, tmp_path):
    """In the process of the test, which goes on as one rank; and as a plain model, without DeepSpeed."""
    mode, checkpoint, before = saved
    rows = saving.whole(before, "saved_rows")
    found = saving.run(tmp_path, 0, 1, mode, "inspect", checkpoint)
    assert differing(rows, saving.whole([found], "saved_rows")) == []
    assert found["plain_loss"] == pytest.approx(before[0]["plain_loss"], abs=1e-6)


def test_a_missing_rank_s_file_is_named(saved, tmp_path):
    import shutil

    mode, checkpoint, _ = saved
    copied = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copied)
    tag = (copied / "latest").read_text()
    (copied / tag / "meft" / "rows-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows-1-of-2\.safetensors is missing"):
        saving.run(tmp_path, 0, 1, mode, "inspect", copied)
    shutil.copy(copied / tag / "meft" / "rows-0-of-2.safetensors", copied / tag / "meft" / "rows-0-of-3.safetensors")
    with pytest.raises(ValueError, match="files of 2 and of 3 ranks"):
        saving.run(tmp_path, 0, 1, mode, "inspect", copied)
