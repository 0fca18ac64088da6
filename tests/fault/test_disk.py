"""A disk that is full at any moment of a save, or that cannot be written to: one sentence, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import meft_engine
from meft_engine.checkpoint import folders
from meft_engine.checkpoint.saver import CheckpointSaveError
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, full_state, train_step

pytestmark = pytest.mark.fault

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "meft-test", str(place)])
    if mounted.returncode:
        pytest.skip("mounting takes root's rights")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes on a disk."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(max(0, free - leave)))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_disk_that_fills_up_at_any_moment(stage, background, disk):
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"async_save": background}), stage=stage)
    folder = disk / "saved"
    train_step(engine, [batch(0)])
    engine.save_checkpoint(str(folder))
    engine._saver.finish()
    saved = full_state(engine)
    train_step(engine, [batch(1)])
    needed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    failures = 0
    for leave in range(0, needed + 40_000, 6_000):
        fill(disk, leave)
        try:
            engine.save_checkpoint(str(folder))
            engine._saver.finish()
        except CheckpointSaveError as error:
            failures += 1
            message = str(error)
            assert "\n" not in message and "could not be written" in message and "untouched" in message
            assert [path.name for path in folders.whole_ones(folder)] == ["global_step1"]
            assert not list(folder.glob(f"*{folders.PARTIAL}")), "what is half written takes up room"
        else:
            break
    else:
        pytest.fail("the last save had room enough")
    assert failures > 10
    assert [path.name for path in folders.whole_ones(folder)] == ["global_step1", "global_step2"]
    other = build_engine(tiny_llama(), stage=stage)
    other.load_checkpoint(str(folder), tag="global_step1")
    assert differing(full_state(other), saved) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_that_cannot_be_written_to(background, disk):
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"async_save": background}), stage=2)
    train_step(engine, [batch(0)])
    engine.save_checkpoint(str(disk / "saved"))
    engine._saver.finish()
    before = full_state(engine)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for place in (disk / "saved", disk / "elsewhere"):
        with pytest.raises(CheckpointSaveError, match="Read-only file system.*untouched"):
            engine.save_checkpoint(str(place), tag="new")
    assert differing(full_state(engine), before) == []
    train_step(engine, [batch(1)])
    engine.load_checkpoint(str(disk / "saved"))
    assert differing(full_state(engine), before) == []


def test_an_export_that_does_not_fit_leaves_the_one_before(disk):
    engine = build_engine(tiny_llama())
    engine.save_adapter(disk / "adapter")
    before = {path.name: path.read_bytes() for path in (disk / "adapter").iterdir()}
    train_step(engine, [batch(0)])
    fill(disk, 8_000)
    with pytest.raises(OSError, match="No space left"):
        engine.save_adapter(disk / "adapter")
    assert {path.name: path.read_bytes() for path in (disk / "adapter").iterdir()} == before
    meft_engine.load_adapter(tiny_llama(), disk / "adapter")
