"""What benchmarks/gpu.py says follows from what it measured; and all of it runs without a card, on small tensors."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_checks
import gpu_kernels
import gpu_marks
import gpu_process
import gpu_training
import pytest
from gpu_contestant import Contestant, configuration

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
WITHOUT_A_CARD = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
WINDOW = {"to_device_bytes": 300, "to_host_bytes": 80, "touched_rows": 7}
SPEEDS = {"to_device": 100.0, "to_host": 40.0, "host": 10.0}


def window(tokens_per_second: float, **others: Any) -> dict[str, Any]:
    return {"seconds": 1.0, "tokens_per_second": tokens_per_second, "phases": {}, **others}


def reaching() -> dict[str, Any]:
    """Figures that reach every mark, just so."""
    meft = {"windows": {"8": window(60.0, over_model=0.9), "32": window(75.0, over_model=0.8)}, "peak_gb": 24.0}
    return {
        "tiny": False,
        "correctness": {"passed": 9, "failed": 0, "skipped": 1},
        "kernels": {
            "disagreeing": [],
            "memory_bound": ["combine", "adam"],
            **{"combine_floor_over_fused": 0.7, "adam_floor_over_fused": 0.9, "pick_floor_over_fused": 0.1},
        },
        "bandwidth": {"gather_over_copy": 0.85},
        "sanitizer": {"memcheck": 0, "racecheck": 0},
        "fit24": {
            "layers": 32,
            "base": {"windows": {"8": window(99.0), "32": window(100.0)}},
            "meft": meft,
            "meft_stale": {"windows": {"32": window(80.0)}, "peak_gb": 23.0},
            "zero_offload": {"windows": {"8": window(20.0), "32": window(25.0)}},
        },
    }


def test_marks_that_are_reached():
    found = gpu_marks.verdicts(reaching())
    assert {name: of["verdict"] for name, of in found.items()} == dict.fromkeys(found, "reached")
    assert {name: of["value"] for name, of in found.items()} == {
        "kernel_tests_failed": 0,
        "kernels_unlike_pytorch": 0,
        "sanitizer_errors": 0,
        "memory_bound_kernels_floor_share": 0.7,
        "gather_over_copy": 0.85,
        "meft_peak_gb": 24.0,
        "meft_over_model": 0.8,
        "meft_stale_over_base_32": 0.8,
        "meft_over_zero_offload": 3.0,
    }


@pytest.mark.parametrize(
    ("mark", "place", "value"),
    [
        ("kernel_tests_failed", ("correctness", "failed"), 1),
        ("kernels_unlike_pytorch", ("kernels", "disagreeing"), ["route"]),
        ("sanitizer_errors", ("sanitizer", "racecheck"), 2),
        ("memory_bound_kernels_floor_share", ("kernels", "adam_floor_over_fused"), 0.69),
        ("gather_over_copy", ("bandwidth", "gather_over_copy"), 0.84),
        ("meft_peak_gb", ("fit24", "meft_stale", "peak_gb"), 24.1),
        ("meft_peak_gb", ("fit24", "meft"), {"out_of_memory": True}),
        ("meft_over_model", ("fit24", "meft", "windows", "8", "over_model"), 0.79),
        ("meft_stale_over_base_32", ("fit24", "base", "windows", "32", "tokens_per_second"), 101.0),
        ("meft_over_zero_offload", ("fit24", "zero_offload", "windows", "8", "tokens_per_second"), 21.0),
    ],
)
def test_a_mark_that_is_missed(mark, place, value):
    """It alone, whatever else is reached."""
    figures = reaching()
    part = figures
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    verdicts = {name: of["verdict"] for name, of in gpu_marks.verdicts(figures).items()}
    assert verdicts.pop(mark) == "missed"
    assert "missed" not in verdicts.values()


def test_marks_of_what_was_not_measured():
    figures = reaching()
    figures["sanitizer"]["memcheck"] = "not run: it needs a GPU"
    figures["fit24"]["layers"] = 8
    del figures["kernels"], figures["bandwidth"], figures["fit24"]["zero_offload"]
    verdicts = {name: of["verdict"] for name, of in gpu_marks.verdicts(figures).items()}
    unknown = {"sanitizer_errors", "kernels_unlike_pytorch", "memory_bound_kernels_floor_share", "gather_over_copy"}
    # A part of the model does not tell whether the whole fits.
    unknown |= {"meft_peak_gb", "meft_over_zero_offload"}
    assert {name for name, verdict in verdicts.items() if verdict == "not measured"} == unknown
    assert verdicts["meft_over_model"] == "reached with 8 of 32 layers"
    assert verdicts["kernel_tests_failed"] == "reached"
    for nothing in ({}, {**reaching(), "tiny": True}):
        assert {of["verdict"] for of in gpu_marks.verdicts(nothing).values()} == {"not measured"}


def test_the_model_of_a_step():
    """The base's two seconds, 300 / 100 up and 80 / 40 down, and 7 rows of 5 columns at 28 or 20 bytes."""
    assert gpu_marks.model_seconds(2.0, WINDOW, SPEEDS, 5) == pytest.approx(2 + 3 + 2 + 7 * 5 * 28 / 10)
    assert gpu_marks.model_seconds(2.0, WINDOW, SPEEDS, 5, "bf16") == pytest.approx(2 + 3 + 2 + 7 * 5 * 20 / 10)
    assert gpu_marks.model_seconds(2.0, {"touched_rows": 7}, SPEEDS, 5) is None


def test_models_stand_beside_what_was_measured():
    contestants = {"base": Contestant("base"), "meft": Contestant("meft", (4,), moments="bf16")}
    found = {
        "base": {"windows": {"4": window(512.0), "8": window(1024.0)}},
        "meft": {"windows": {"4": window(400.0, **WINDOW)}},
    }
    found["meft"]["windows"]["4"]["seconds"] = 10.0
    gpu_training.add_models(found, contestants, SPEEDS | {"host": 1e6})
    # Four micro-batches of 512 tokens at the base's best speed.
    expected = 2.0 + 3 + 2 + 7 * 4096 * 20 / 1e6
    assert found["meft"]["windows"]["4"]["model_seconds"] == pytest.approx(expected, abs=1e-5)
    assert found["meft"]["windows"]["4"]["over_model"] == pytest.approx(expected / 10, abs=1e-4)
    gpu_training.add_models({"meft": {"error": "none"}}, {"meft": contestants["meft"]}, SPEEDS)


def test_contestants_need_host_memory_and_are_refused_without():
    elements = 32 * 2 * 16384 * 4096
    meft, dense = Contestant("meft"), Contestant("dense")
    assert meft.host_bytes() == 16 * elements and dense.host_bytes() == 20 * elements
    assert replace(meft, moments="bf16").host_bytes() == 12 * elements
    assert replace(meft, layers=8).host_bytes() == 4 * elements
    assert Contestant("base").host_bytes() == Contestant("lora").host_bytes() == 0
    assert gpu_training.refusal(meft, 16 * elements) is None
    assert gpu_training.refusal(meft, 8 * elements) == (
        "69 GB of host memory are needed for 32 layers, and 34 GB are free; --layers 16 would fit"
    )


def test_contestants_are_configured_as_the_24_gb_file_says():
    file = json.loads((ROOT / "ds_configs" / "meft_24gb.json").read_text(encoding="utf-8"))
    meft = configuration(Contestant("meft", (8, 32), max_staleness=1))
    assert meft["meft"]["active_rows"] == file["meft"]["active_rows"] and meft["bf16"] == {"enabled": True}
    assert meft["meft"]["adapter"] == {**file["meft"]["adapter"], "rows": 16384}
    assert meft["meft"]["optimizer"].items() >= {"max_staleness": 1, "moments_dtype": "fp32"}.items()
    assert meft["gradient_accumulation_steps"] == 8 and meft["gradient_clipping"] == file["gradient_clipping"]
    dense = configuration(Contestant("dense"))
    assert dense["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert not dense["optimizer"]["params"]["torch_adam"] and "meft" not in dense


def test_tiny_contestants_are_those_of_the_plan():
    tiny = gpu_training.plan([*gpu_training.PLAN], 32, "bf16", tiny=True)
    assert [*tiny] == ["base", "meft", "zero_offload", "meft_stale", "lora"]
    assert all(one.tiny and one.layers == 2 and not one.capped for one in tiny.values())
    assert tiny["meft"].accumulations == (2, 8) and tiny["meft_stale"].accumulations == (8,)
    whole = gpu_training.plan(["lora", "meft"], 16, "bf16", tiny=False)
    assert [*whole] == ["meft", "lora"] and all(one.layers == 16 and one.capped for one in whole.values())
    assert whole["meft"].moments == "bf16"


def test_what_bounds_a_kernel():
    def contest(**floors: float) -> gpu_kernels.Contest:
        return gpu_kernels.Contest("kernel", lambda: None, lambda: None, **floors)

    assert contest(moved=2e-5, multiplied=1e-5).bound_by == "memory" and contest(moved=2e-5).floor == 2e-5
    assert contest(moved=2e-5, multiplied=3e-5).bound_by == "products"
    assert contest(carried=1e-3).bound_by == "bus"
    assert contest(moved=9e-6).bound_by == "launch"


def test_what_tests_and_tools_say_is_counted():
    report = '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    assert gpu_checks.counted(report) == {"passed": 3, "failed": 3, "skipped": 3}
    clean = "4 passed in 9.21s\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_checks.summarised(clean) == 0
    assert gpu_checks.summarised(clean.replace("0 errors", "12 errors")) == 12
    assert gpu_checks.summarised("4 passed\n== RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n") == 3
    # A tool that stops before the tests have run has found no errors, nor anything else.
    assert (
        gpu_checks.summarised("========= ERROR SUMMARY: 0 errors\n") == "no summary: ========= ERROR SUMMARY: 0 errors"
    )
    assert gpu_checks.summarised("Device not supported\n") == "no summary: Device not supported"


def test_a_part_that_fails_says_why(capsys):
    def run(code: str, timeout: float = 60) -> dict[str, Any]:
        return gpu_process.run([sys.executable, "-c", code], timeout=timeout, environment=os.environ)

    assert run("print('first'); print('{\"a\": 1}')") == {"a": 1}
    assert capsys.readouterr().out == "first\n"
    assert run("print('{\"a\": 1}'); raise SystemExit('no card')") == {"error": "no card"}
    assert run("1 / 0") == {"error": "ZeroDivisionError: division by zero"}
    assert run("print('nothing')") == {"error": "ended with 0 and without figures"}
    assert run("import time; time.sleep(60)", timeout=0.5) == {"error": "not done after 0 s"}


def test_lines_of_other_cards_stages_and_contestants_stay(tmp_path):
    about = {"driver": "1", "python": "3", "torch": "2", "triton": "3", "tiny": False}

    def write(card: str, **stages: Any) -> None:
        gpu.write_csv(tmp_path / "gpu.csv", {"card": card, **about, **stages}, [*stages])

    write("A", kernels={"adam_ms": 1}, fit24={"base": {"windows": {"8": {"seconds": 1}}}, "lora": {"peak_gb": 2}})
    write("B", kernels={"adam_ms": 3})
    write("A", bandwidth={"error": "none", "stage_seconds": 4})
    write("A", bandwidth={"best_programs": 16}, fit24={"base": {"windows": {"8": {"seconds": 5}}}})
    with (tmp_path / "gpu.csv").open() as file:
        lines = [(line["card"], line["stage"], line["figure"], line["value"]) for line in csv.DictReader(file)]
    assert sorted(lines) == [
        ("A", "bandwidth", "best_programs", "16"),
        ("A", "bandwidth", "stage_seconds", "4"),
        ("A", "fit24", "base.windows.8.seconds", "5"),
        ("A", "fit24", "lora.peak_gb", "2"),
        ("A", "kernels", "adam_ms", "1"),
        ("B", "kernels", "adam_ms", "3"),
    ]


def test_it_wants_a_card_and_stages_that_there_are():
    done = subprocess.run([*COMMAND, "kernels"], env=WITHOUT_A_CARD, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("no CUDA device here; --tiny runs everything")
    done = subprocess.run([*COMMAND, "speed", "--tiny"], env=WITHOUT_A_CARD, capture_output=True, text=True)
    assert done.returncode == 2 and "no stage is named speed; there are correctness, kernels" in done.stderr


def test_all_stages_run_without_a_card(tmp_path):
    command = [*COMMAND, "all", "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, env=WITHOUT_A_CARD, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tiny"] is True and {"card", "driver", "torch", "triton"} <= figures.keys()
    assert all("error" not in figures[stage] and f"{stage} took" in done.stdout for stage in gpu.STAGES)
    assert figures["correctness"]["passed"] == len(gpu_checks.FEW_INTERPRETED) and not figures["correctness"]["failed"]
    kernels = figures["kernels"]
    assert not kernels["disagreeing"] and {"route_ms", "gather_fused_unfused_over_fused"} <= kernels.keys()
    assert {f"{name}_floor_over_fused" for name in kernels["memory_bound"]} <= kernels.keys()
    bandwidth = {"copy_gb_per_s", "staged_gb_per_s", "gather_16_gb_per_s", "best_programs", "gather_over_copy"}
    assert bandwidth <= figures["bandwidth"].keys()
    assert all(str(figures["sanitizer"][tool]).startswith("not run") for tool in gpu_checks.TOOLS)
    fit = figures["fit24"]
    for name, counts in {"base": "28", "lora": "28", "zero_offload": "28", "meft": "28", "meft_stale": "8"}.items():
        assert [*fit[name]["windows"]] == [*counts] and "peak_gb" in fit[name]
        assert all(one["tokens_per_second"] > 0 for one in fit[name]["windows"].values())
    # All rows of two layers' keys and values, at 64 picks of 64 rows.
    assert 0 < fit["meft"]["windows"]["8"]["touched_rows"] <= 2 * 2 * 64
    assert {"forward", "backward", "update"} <= fit["meft"]["windows"]["8"]["phases"].keys()
    assert figures["marks"].keys() == {mark.name for mark in gpu_marks.MARKS}
    assert {of["verdict"] for of in figures["marks"].values()} == {"not measured"}
    with (tmp_path / "gpu.csv").open() as file:
        lines = {(line["stage"], line["figure"]): line for line in csv.DictReader(file)}
    assert lines["kernels", "adam_ms"]["tiny"] == "True" and lines["kernels", "adam_ms"]["torch"] == figures["torch"]
    assert ("fit24", "meft.windows.8.tokens_per_second") in lines
