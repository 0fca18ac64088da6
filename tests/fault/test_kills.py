"""One rank or all are killed at every phase of a save: the next start goes on from a whole checkpoint, each time."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from meft_engine.checkpoint import folders
from tests.ranks.worlds import end_world, start_world

pytestmark = pytest.mark.fault

RANKS = 2
PHASES = ["begin", "deepspeed", "rows", "manifest", "place", "latest", "prune", "done"]
KILLS = [(phase, who) for phase in PHASES for who in ("0", "1", "all")]
BEFORE_LATEST = PHASES[: PHASES.index("latest")]


class Chain:
    """Starts that each go on from what the last one left."""

    def __init__(self, folder: Path, stage: int, background: bool) -> None:
        self.folder, self.settings = folder, [str(stage), "background" if background else "at once"]
        self.resumed = 0
        self.digests: dict[tuple[int, int], str] = {}
        """What each rank was when it began to save, by the step and the rank."""

    def start(self, name: str, phase: str, who: str, delay: float) -> int:
        """Start both ranks and see them killed; the step that they went on from."""
        logs = self.folder / "logs" / name
        arguments = ["-m", "tests.fault.victim", str(self.folder / "saved"), *self.settings, phase, who, str(delay)]
        world = start_world(logs, RANKS, arguments)
        lost = [rank for rank in range(RANKS) if who in ("all", str(rank))] if phase != "none" else []
        try:
            end = time.monotonic() + 180
            while any(world[rank].poll() is None for rank in lost or range(RANKS)):
                assert time.monotonic() < end, [(logs / f"{rank}.log").read_text()[-2000:] for rank in range(RANKS)]
                time.sleep(0.02)
            codes = [process.returncode for process in world]
            output = [(logs / f"{rank}.log").read_text() for rank in range(RANKS)]
            assert all(codes[rank] == -signal.SIGKILL for rank in lost), (codes, output)
            assert lost or codes == [0, 0], (codes, output)
        finally:
            end_world(world)
        return self._read(output)

    def _read(self, output: list[str]) -> int:
        found = set()
        for rank, text in enumerate(output):
            words = [line.split() for line in text.splitlines() if line.startswith(("resumed ", "saves "))]
            resumed = [line for line in words if line[0] == "resumed"]
            for _, step, digest in resumed:
                assert digest == self.digests[int(step), rank], f"rank {rank} is not what it was at step {step}"
            found.add(int(resumed[0][1]) if resumed else 0)
            # A step that was killed before its save was done is taken anew, with the same result.
            for _, step, digest in (line for line in words if line[0] == "saves"):
                assert self.digests.setdefault((int(step), rank), digest) == digest
        assert len(found) == 1, "ranks went on from different steps"
        return found.pop()


@pytest.mark.parametrize(("stage", "background"), [(0, False), (2, True), (3, False)])
def test_every_phase_of_a_save(stage, background, tmp_path):
    chain, draw = Chain(tmp_path, stage, background), random.Random(stage)
    assert chain.start("first", "none", "", 0.0) == 0
    saved = 1
    for number, (phase, who) in enumerate(KILLS):
        # Every other time at once, else a moment later, while the phase or one of the next is under way.
        delay = draw.uniform(0.001, 0.1) if number % 2 else 0.0
        assert chain.start(f"{number}-{phase}-{who}", phase, who, delay) == saved
        left = folders.find(tmp_path / "saved", None)
        manifest = folders.read_manifest(left)
        folders.require_whole(left, manifest.files, manifest.files)
        if phase in BEFORE_LATEST and not delay and who != "1":
            assert manifest.global_steps == saved, "a save that was killed counts"
        if phase == "done":
            assert manifest.global_steps == saved + 1
        assert manifest.global_steps in (saved, saved + 1)
        saved = manifest.global_steps
    assert saved > len(PHASES) // 2
    assert chain.start("last", "none", "", 0.0) == saved
    assert [folder.name for folder in folders.whole_ones(tmp_path / "saved")][-1] == f"global_step{saved + 1}"
    assert not list((tmp_path / "saved").glob(f"*{folders.PARTIAL}"))
