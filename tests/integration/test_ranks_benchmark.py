"""What benchmarks/ranks.py rests on: its model and what it draws; and a quick run, whose figures belong together."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks_model as model
import torch
from ranks_cases import Case, Shape, cases_of

ROOT = Path(__file__).parents[2]
SHAPE = Shape(width=512, layers=4, rows=4096)
CONSTANTS = model.Constants(40e-6, 15e-6, 0.4e-9, 30e-6, 150e-6, 0.9e-9, 0.7e-9)


def test_constants_are_found_again_in_what_they_explain():
    points = []
    for ranks in (2, 4, 8):
        crowd = model.crowd(ranks, 2)
        for size in (64, 65536, 1 << 20):
            alone = CONSTANTS.collective + (ranks - 1) * (CONSTANTS.message + size * CONSTANTS.byte)
            points.append(model.Point("all_to_all", ranks, size, crowd * alone))
        points.append(model.Point("all_gather", ranks, 64, crowd * (ranks - 1) * CONSTANTS.ring_step))
    found, off = model.fit(points, cores=2)
    assert off < 1e-9

    def measured(seconds: Any) -> list[tuple[model.Load, float]]:
        loads = [
            model.load(SHAPE, ranks, percent, "random", ranks_of_node=ranks)
            for ranks in (2, 4)
            for percent in (1.0, 3.0, 20.0)
        ]
        return [(load, model.crowd(load.ranks, 2) * seconds(load)) for load in loads]

    found = model.with_handling(found, measured(lambda load: model.exchange_seconds(CONSTANTS, load)["exchange"]), 2)
    found = model.with_reduction(found, measured(lambda load: model.dense_seconds(CONSTANTS, load)), 2)
    assert vars(found) == pytest.approx(vars(CONSTANTS))


def test_a_network_slows_down_what_passes_it():
    slow = replace(CONSTANTS, byte=0.0, handled_byte=0.0, network=1e9)
    abroad = model.load(SHAPE, 16, 10, "random")
    assert abroad.nodes == 2
    parts = model.exchange_seconds(slow, abroad)
    # Of a rank's 15 fellows 8 are on the other node, and 8 ranks share a node's network.
    assert parts["gradients"] == pytest.approx(40e-6 + 15 * 15e-6 + 8 * abroad.gradient_bytes * 8 / 15 / 1e9)
    least = 8 * abroad.published_bytes / 1e9
    # A table is published in one message, to a rank of the other node.
    assert parts["publication"] == pytest.approx(least + SHAPE.tables * (40e-6 + 15e-6))
    assert model.dense_network_seconds(slow, abroad) == pytest.approx(abroad.dense_bytes / 1e9)
    assert model.exchange_seconds(CONSTANTS, model.load(SHAPE, 8, 10, "random"))["publication"] == 0
    empty = model.Load(replace(SHAPE, width=0), 16, 0.0, 1e-9)
    found = model.exchange_seconds(replace(CONSTANTS, byte=0.0, handled_table=0.0), empty)
    assert model.message_seconds(CONSTANTS, empty) == pytest.approx(found["exchange"] + found["publication"], rel=1e-6)
    both = 8 * (8 / 15 * (abroad.gradient_bytes + abroad.fact_bytes) + abroad.published_bytes)
    assert model.network_seconds(slow, abroad) == pytest.approx(both / 1e9)


@pytest.mark.parametrize("overlap", ["random", "equal", "disjoint"])
def test_rows_overlap_as_the_model_says(overlap):
    case, ranks = Case(10.0, overlap), 4
    drawn = [case.draw(SHAPE.rows, 3, 7, rank) for rank in range(ranks)]
    assert all(len(rows) == len(rows.unique()) == 410 for rows in drawn)
    union = len(torch.cat(drawn).unique())
    load = model.load(SHAPE, ranks, 10.0, overlap)
    assert union == pytest.approx(load.union, rel=0.03)
    assert not torch.equal(drawn[0], case.draw(SHAPE.rows, 3, 8, 0))
    assert not torch.equal(drawn[0], case.draw(SHAPE.rows, 4, 7, 0))


def test_every_world_has_the_case_that_figures_are_of():
    assert all(Case(10.0) in cases_of(ranks, (3.0, 10.0), 10.0) for ranks in (1, 2, 4))
    assert not any(case.overlap == "disjoint" for case in cases_of(4, (30.0,), 30.0))


@pytest.mark.parametrize("seconds, ends", [([1, 1, 1], None), ([3, 1, 1], None), ([1, 3, 2], 4), ([3, 1, 2], 8)])
def test_where_the_gain_ends(seconds, ends):
    lines = [{"ranks": 2 ** (i + 1), "seconds": s, "dense_seconds": 2.0} for i, s in enumerate(seconds)]
    assert model.gain_ends(lines[::-1], "seconds") == ends


@pytest.mark.ranks
def test_a_quick_run_ends_in_figures_that_belong_together(tmp_path):
    arguments = ["benchmarks/ranks.py", "--quick", "--out", str(tmp_path), "--timeout", "300"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    last = json.loads(ended.stdout.strip().splitlines()[-1])
    with (tmp_path / "ranks.csv").open() as file:
        lines = [Line(line) for line in csv.DictReader(file)]
    assert (tmp_path / "ranks.png").stat().st_size > 10_000

    exchanges = [line for line in lines if line.what == "exchange"]
    several = [line for line in exchanges if line.ranks > 1]
    assert {line.ranks for line in exchanges} == {1, 2, 4} and {line.wire for line in several} == {"fp32", "bf16"}
    for line in several:
        load = model.load(line.shape, line.ranks, 10.0, line.overlap, wire_bytes={"fp32": 4, "bf16": 2}[line.wire])
        row = 4 + line.shape.width * load.wire_bytes
        assert line.floor_bytes == pytest.approx(line.rows_of_others * row, rel=1e-3)
        # Beside the rows of others: how many there are, what fills parts up to 8 bytes, and the rounding of means.
        rest = line.bytes - line.floor_bytes - load.fact_bytes
        assert -1 <= rest <= 8 * (line.ranks - 1) + 1
        assert line.bytes == pytest.approx(load.bytes - load.published_bytes, rel=0.05)
        if line.kernel_bytes:
            assert line.kernel_bytes > line.bytes if last["quiet_network"] else line.kernel_bytes > 0
    assert {line.overlap for line in several} == {"random", "equal", "disjoint"}
    for line in several:
        if line.overlap == "equal":
            assert line.rows_of_others == pytest.approx(410 * 2 * (1 - 1 / line.ranks), abs=0.1)

    (published,) = [line for line in lines if line.what == "publication"]
    assert published.bytes == published.floor_bytes > 0
    # Every row that a rank has updated goes to the other of two nodes; together they updated the union.
    union = model.load(published.shape, 4, 10.0, "random").union * published.shape.tables
    assert published.bytes == pytest.approx(union / 4 * (4 + 2 * published.shape.width), rel=0.03)

    for ranks in (2, 4):
        (dense,) = [line for line in lines if line.what == "dense all-reduce" and line.ranks == ranks]
        assert last[f"dense_bytes_{ranks}"] == dense.bytes == 2 * (ranks - 1) / ranks * dense.shape.dense_bytes
        if last["quiet_network"]:
            assert dense.kernel_bytes == pytest.approx(dense.bytes, rel=0.1)
        (default,) = [
            x for x in several if (x.ranks, x.nodes_played, x.overlap, x.wire) == (ranks, 1, "random", "fp32")
        ]
        assert last[f"bytes_{ranks}"] == default.bytes
        assert last[f"seconds_{ranks}"] == pytest.approx(default.median_ms / 1e3, abs=2e-6)
        assert last[f"dense_seconds_{ranks}"] == pytest.approx(dense.median_ms / 1e3, abs=2e-6)
    assert last["bytes_1"] == 0 and last["seconds_1"] > 0
    over = max(x.bytes / (x.rows_of_others * x.shape.width * 4) for x in several if x.wire == "fp32")
    assert last["bytes_over_touched_rows"] == pytest.approx(over, abs=1e-4)
    assert ("bytes_over_touched_rows" in last["missed"]) == (over > 1.02)

    shape = default.shape
    least = 12 * shape.tables * shape.rows * shape.width  # bf16 and lower planes, two moments in fp32
    assert least < last["host_pss_1"] < 1.3 * least
    # A compute copy for each rank would make it 1.5, moments for each 3 or more; each process has some noise.
    assert 0.9 < last["host_pss_ratio_4"] < 1.3
    assert last["host_pss_ratio_4"] == pytest.approx(last["host_pss_4"] / last["host_pss_1"], abs=1e-4)

    with (tmp_path / "ranks_model.csv").open() as file:
        modelled = {key(line): line for line in csv.DictReader(file)}
    end = modelled["cluster", "1024", "10", "random", "fp32"]
    assert last["model_seconds_1024"] == pytest.approx(float(end["seconds"]), rel=1e-3)
    assert last["model_dense_seconds_1024"] == pytest.approx(float(end["dense_seconds"]), rel=1e-3)
    parts = ("counts", "facts", "gradients", "handling", "publication")
    assert sum(float(end[f"{part}_seconds"]) for part in parts) == pytest.approx(float(end["seconds"]), rel=1e-4)
    assert len(modelled) == 2 * 3 * 2 * 2 * 11


def key(line: dict[str, str]) -> tuple[str, ...]:
    """What tells the model's lines apart."""
    return tuple(line[name] for name in ("constants", "ranks", "touched_percent", "overlap", "wire"))


class Line:
    """A line of ranks.csv with numbers in it."""

    def __init__(self, line: dict[str, str]) -> None:
        self.what, self.overlap, self.wire = line["what"], line["overlap"], line["wire"]
        self.ranks, self.nodes_played = int(line["ranks"]), int(line["nodes_played"])
        self.shape = Shape(int(line["width"]), int(line["tables"]) // 2, int(line["rows"]))
        names = ("median_ms", "bytes", "floor_bytes", "rows_of_others")
        self.median_ms, self.bytes, self.floor_bytes, self.rows_of_others = (float(line[name]) for name in names)
        self.kernel_bytes = float(line["kernel_bytes"] or 0)
