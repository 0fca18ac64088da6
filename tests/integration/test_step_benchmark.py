"""What benchmarks/step.py says follows from what it measured, and its contestants train what they say."""

from __future__ import annotations

import csv

import pytest
import step
import torch
from step_contestant import Contestant
from step_floor import Machine

from meft_engine.planner.passes import parts
from tests.families import VOCAB, tiny_llama

SHAPE = {
    "layers": 2,
    "width": 10,
    "rows": 64,
    "experts": 8,
    "per_token": 2,
    "top_k": 3,
    "size": 4,
}


def measured(case: str, contestant: Contestant, seconds: list[float], **figures: object) -> step.Measured:
    given = {
        "counted_bytes": 0,
        "resident_bytes": 0,
        "device_bytes": 0,
        "touched_share": 0.5,
        "phases": {},
        "shape": {},
    }
    return step.Measured(case, contestant, given | figures, seconds)


def test_ratios_are_of_the_same_round():
    """The machine is twice as slow in the second round; the ratio is 1.2 in each."""
    found = [
        measured("default", step.BASE, [1.0, 2.0, 1.0]),
        measured("default", step.DEFAULT, [1.2, 2.4, 1.2]),
        measured("zero offload", step.DEFAULT, [1.0], counted_bytes=300, resident_bytes=500),
        measured("zero offload", step.DENSE, [4.0], counted_bytes=400, resident_bytes=700),
        measured("growth", step.growing(4096), [1.0, 1.0]),
        measured("growth", step.growing(32768), [1.0, 1.1]),
    ]
    figures = step.figures_of(found)
    assert figures["meft_over_base_8192"] == 1.2 and figures["zero_offload_over_meft_8192"] == 4.0
    assert figures["growth_4096_32768"] == 1.05 and figures["host_bytes_ratio_8192"] == 0.75
    assert figures["meft_over_base_8192_k64"] is None and set(step.TARGETS) < set(figures)


def test_lines_of_the_plan_hold_candidates_and_active_rows_fixed():
    for case in ("growth", "growth, between", "growth, ten layers", "growth, two layers"):
        for contestant in step.PLAN[case].contestants:
            assert contestant.rows // contestant.experts == step.EXPERT_ROWS and contestant.cap == step.CAP
    for case, line in step.PLAN.items():
        assert len(set(line.contestants)) == len(line.contestants), case


def test_floors_count_what_a_part_has_to_move():
    by = {part.phase: part for part in parts(tokens=5, touched=0.5, **SHAPE)}
    # Two layers; all keys and the router are read; 5 tokens are scored against 8 experts and 2 × 8 candidates.
    assert by["route"].moved == 2 * (64 + 8) * 10 * 4 and by["route"].flops == 2 * 2 * 5 * 10 * (8 + 16)
    assert by["combine"].moved == 2 * 32 * 10 * 4 and by["combine"].flops == 2 * 2 * 5 * 3 * 10
    assert by["row_gradients"].moved == 2 * 2 * 2 * 32 * 10 * 4
    assert by["update"].moved == 2 * 2 * 32 * 10 * 28
    slow_memory, slow_cores = Machine(10.0, 1e30), Machine(1e30, 10.0)
    assert by["combine"].floor(slow_memory) == by["combine"].moved / 10
    assert by["combine"].floor(slow_cores) == by["combine"].flops / 10
    assert slow_memory.at_best(slow_cores) == slow_cores.at_best(slow_memory) == Machine(1e30, 1e30)


def test_results_are_written_and_drawn(tmp_path):
    found = [
        measured("default", step.BASE, [1.0]),
        measured("default", step.DEFAULT, [1.2], phases={"route": 0.1, "update": 0.2}, shape=SHAPE),
        measured("rows", Contestant("meft", 1024), [1.0]),
    ]
    profile = step.profile_of(found, Machine(1e9, 1e9))
    step.write_csv(tmp_path / "step.csv", found)
    step.write_profile(tmp_path / "profile.csv", profile)
    step.picture(tmp_path / "step.png", found, profile, "a machine")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    lines = list(csv.DictReader((tmp_path / "step.csv").open()))
    assert [line["median_ms"] for line in lines] == ["1000.00", "1200.00", "1000.00"]
    assert {line["phase"]: line["measured_ms"] for line in csv.DictReader((tmp_path / "profile.csv").open())} == {
        "route": "100.0",
        "combine": "0.0",
        "row_gradients": "0.0",
        "update": "200.0",
        "backward": "0.0",
    }


@pytest.mark.parametrize("method", ["base", "meft", "lora"])
def test_contestants_take_steps_when_asked(method, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    contestant = Contestant(method, 64 if method == "meft" else 0, sequences=2, length=8)
    with step.running(contestant, str(tmp_path), torch.arange(50) % VOCAB, 1) as pipe:
        assert step.ask(pipe, "steps", 2) > 0
        figures = step.ask(pipe, "figures")
    if method == "base":
        assert figures["counted_bytes"] == 0 and not figures["shape"]
    if method == "meft":
        shape = figures["shape"]
        table = shape["layers"] * shape["rows"] * shape["width"] * 2
        assert shape["rows"] == 64 and figures["touched_share"] > 0
        # Masters and moments, in fp32 12 bytes a number, and what else there is.
        assert 12 * table <= figures["counted_bytes"] < 40 * table
        assert {"route", "combine", "row_gradients", "update"} <= set(figures["phases"])
