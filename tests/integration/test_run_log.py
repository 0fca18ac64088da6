"""The log of a run: what an engine writes, against what it did, and where runs end, go on, or are cut off."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import log_cost
import pytest
import torch

from meft_engine import recorder, run_log
from meft_engine.planner import device_bytes_needed, host_bytes_needed
from meft_engine.recorder import planned_host_bytes, update_counts
from meft_engine.run_report.reader import read_run
from meft_engine.watching import Watch
from tests.families import fill_values, tiny_block, tiny_config, tiny_llama
from tests.integration.engines import batch, build_engine, lm_loss, train_step
from tests.integration.test_watching import run_trainer


def make_engine(folder: Path | None, adapter: dict | None = None, interval: int = 2, **settings: Any) -> Any:
    monitor = {"interval": interval, **({"folder": str(folder)} if folder is not None else {})}
    sections = settings.pop("sections", {})
    engine = build_engine(tiny_llama(), tiny_block(adapter, monitor=monitor, **sections), stage=1, **settings)
    fill_values(engine.meft_adapters)
    return engine


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record in run_log.read(folder)]


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in run_log.read(folder) if record["kind"] == kind]


# --- what an engine writes


def test_a_run_from_its_first_step_to_its_end(tmp_path):
    engine = make_engine(tmp_path / "run", gas=2)
    losses = [train_step(engine, [batch(2 * step), batch(2 * step + 1)]) for step in range(5)]
    engine.destroy()
    assert kinds(tmp_path / "run") == [
        "start",
        *("step", "layers", "memory"),
        "step",
        *("step", "layers", "memory"),
        "end",
    ]
    (start,) = of_kind(tmp_path / "run", "start")
    assert start["step"] == 0 and start["model"] == "LlamaForCausalLM" and start["zero_stage"] == 1
    assert start["layers"] == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert start["block"] == json.loads(json.dumps(engine.meft_config.resolved()))
    assert (start["rows"], start["width"], start["ranks"], start["compute_dtype"]) == (35, 32, 1, "float32")
    assert start["batch"] == {
        **{"micro_batch": 4, "accumulation_steps": 2, "samples_a_step": 8},
        "most_tokens_of_a_micro_batch": 48,
    }
    assert start["optimizer"]["name"] == "AdamW" and start["optimizer"]["lr"] == 0.01
    assert start["adapter_parameters"] == 3 * (2 * 35 * 32 + 5 * 32)
    steps = of_kind(tmp_path / "run", "step")
    assert [record["step"] for record in steps] == [2, 4, 5]
    assert [record["samples"] for record in steps] == [16, 32, 40]
    assert [record["tokens"] for record in steps] == [2 * 48 * step for step in (2, 4, 5)]
    found = [record["figures"]["loss"] for record in steps]
    assert found == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]], abs=1e-5)
    seconds = [record["seconds"] for record in steps]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert of_kind(tmp_path / "run", "end")[0]["error"] is None


@pytest.mark.host_only  # what a device needs is then what it has
def test_the_plan_and_what_is_allocated(tmp_path):
    for moments, folder in (("fp32", tmp_path / "a"), ("bf16", tmp_path / "b")):
        engine = make_engine(folder, sections={"optimizer": {"moments_dtype": moments}}, bf16=moments == "bf16")
        for step in range(2):
            train_step(engine, [batch(step)])
        (memory,), (start,) = of_kind(folder, "memory"), of_kind(folder, "start")
        assert memory["host"] == start["planned"]["host"], "to the byte"
        assert sum(memory["host"].values()) == engine.meft_report()["host_bytes"]
        assert memory["device"] == engine.meft_report()["device_bytes_by_kind"]
        dtype = engine.meft_adapters.compute_dtype
        assert start["planned"]["device"] == device_bytes_needed(engine.meft_config, 3, 32, 48, compute_dtype=dtype)
        assert memory["host_resident"] > 10**8 and memory["device_peak"] is None


@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
@pytest.mark.parametrize(("ranks", "of_node"), [(1, 1), (4, 2)])
def test_kinds_add_up_to_the_plan(mode, ranks, of_node):
    config = tiny_config(optimizer={"mode": mode, "moments_dtype": "bf16"})
    world = {"ranks": ranks, "ranks_of_node": of_node, "compute_dtype": torch.bfloat16}
    found = planned_host_bytes(config, [32, 32, 64], **world)
    assert sum(found.values()) == sum(host_bytes_needed(config, 1, w, trainable=True, **world) for w in (32, 32, 64))
    part = of_node / ranks if mode == "lazy" else 1
    rows = 2 * 35 * 128
    assert found == {"rows": rows * 2 + rows * 2 * part, "moments": rows * 2 * 2 * part, "steps": 3 * 2 * 35 * 4 * part}


def test_experts_and_rows_are_those_of_the_selections(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "READINGS_PER_LAYERS", 2)
    monkeypatch.setattr(recorder, "MOST_BINS", 3)
    # Updates that run beside a reading may be counted or not.
    engine = make_engine(tmp_path, interval=1, sections={"optimizer": {"overlap": False}})
    updates = torch.zeros(3, 35, dtype=torch.int64)
    chosen = torch.zeros(6, 3, 5, dtype=torch.int64)  # of each step
    now = 0
    for layer, adapter in enumerate(engine.meft_adapters.adapters.values()):

        def observe(selection: Any, *others: Any, layer: int = layer) -> None:
            active = selection.active if selection.count is None else selection.active[: int(selection.count)]
            updates[layer, active] += 1
            chosen[now, layer] += selection.experts.flatten().bincount(minlength=5)

        adapter.observers.append(observe)
    for step in range(6):
        now = step
        train_step(engine, [batch(step, size=2, length=3 if step else 12)])
        if step == 4:
            at_five = updates.clone()
    first, second, third = of_kind(tmp_path, "layers")
    assert [(r["since"], r["step"]) for r in (first, second, third)] == [(0, 1), (1, 3), (3, 5)]
    load = chosen[3:5].sum(0)
    assert third["experts_a_bin"] == 2 and third["experts"] == 5
    assert third["load"] == [[int(e[0:2].sum()), int(e[2:4].sum()), int(e[4])] for e in load]
    assert third["dead"] == [int((e == 0).sum()) for e in load]
    assert third["kept"] == [1.0, 1.0, 1.0] and all(0 < share < 1 for share in third["touched"])
    assert third["update_bins"] == [0, 1, 2, 4]
    spans = [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert third["updates"] == [[int(((n >= a) & (n <= b)).sum()) for a, b in spans] for n in at_five]


@pytest.mark.parametrize(
    ("counts", "bins", "found"),
    [
        ([[0, 0]], [0], [[2]]),
        ([[0, 1, 1], [8, 7, 3]], [0, 1, 2, 4, 8], [[1, 2, 0, 0, 0], [0, 0, 1, 1, 1]]),
        ([[], [2**31 - 1]], [0, *(2**k for k in range(31))], [[0] * 32, [*[0] * 31, 1]]),
    ],
)
def test_bins_of_updates(counts, bins, found):
    assert update_counts([torch.tensor(of_layer, dtype=torch.int32) for of_layer in counts]) == (bins, found)


def test_an_optimizer_that_does_not_count_updates_says_so(tmp_path):
    engine = make_engine(tmp_path, sections={"optimizer": {"mode": "dense_equivalent"}})
    for step in range(2):
        train_step(engine, [batch(step)])
    (layers,) = of_kind(tmp_path, "layers")
    assert layers["updates"] is None and layers["update_bins"] == []


def test_a_loss_that_is_not_finite_is_written_as_json_can(tmp_path):
    engine = make_engine(tmp_path, interval=1)
    engine.backward(lm_loss(engine, batch(1)) * math.inf)
    engine.step()
    line = next(line for line in (tmp_path / run_log.FILE).read_text().splitlines() if '"step"' in line[:20])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse)["figures"]["loss"] == "inf"
    assert math.isinf(run_log.number("inf")) and math.isnan(run_log.number(None))


def test_what_it_costs_can_be_measured(capsys):
    found = log_cost.main(["--layers", "2", "--rows", "40", "--num_experts", "10"])
    assert found["a closer look"] > 0 and found["a step of training"] > 0
    assert "a closer look: " in capsys.readouterr().out


# --- where it is written, and by whom


def test_nothing_is_written_between_readings_nor_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = make_engine(None)
    for step in range(3):
        train_step(engine, [batch(step)])
    engine.destroy()
    assert list(tmp_path.iterdir()) == []
    written = []
    monkeypatch.setattr(run_log, "append", lambda folder, kind, **values: written.append((values["step"], kind)))
    engine = make_engine(tmp_path / "run", interval=3)
    for step in range(5):
        train_step(engine, [batch(step)])
    assert written == [(0, "start"), (3, "step"), (3, "layers"), (3, "memory")]


def test_other_ranks_write_nothing(tmp_path):
    engine = make_engine(tmp_path / "run")
    engine.global_rank = 1
    engine._watch = Watch(engine)
    for step in range(2):
        train_step(engine, [batch(step)])
    engine._watch.recorder.begin(tmp_path / "run")
    engine.destroy()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_is_said_once_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level(logging.WARNING, logger="meft_engine")
    logging.getLogger("meft_engine").propagate = True
    engine = make_engine(tmp_path / "file" / "run", interval=1)
    for step in range(3):
        train_step(engine, [batch(step)])
    told = [record.message for record in caplog.records if "log cannot be written" in record.message]
    assert len(told) == 1 and "monitor.folder" in told[0] and "\n" not in told[0]


# --- ends, and going on


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    run = tmp_path / "run"
    first = make_engine(run, interval=1)
    for step in range(3):
        train_step(first, [batch(step)])
        if step == 1:
            first.save_checkpoint(str(tmp_path / "saved"))
    first.destroy()
    second = make_engine(run, interval=1)
    second.load_checkpoint(str(tmp_path / "saved"))
    losses = [train_step(second, [batch(step)]) for step in (7, 8)]
    second.destroy()
    starts = of_kind(run, "start")
    assert [record["step"] for record in starts] == [0, 2]
    steps = of_kind(run, "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 3, 4]
    found = read_run(run, "run")
    assert found.resumes == 1 and found.state() == "finished"
    assert [record["step"] for record in found.steps] == [1, 2, 3, 4], "what was given up is left out"
    assert found.figure("loss")[1][2:] == pytest.approx(losses, abs=1e-5)
    assert found.tokens == 4 * 48
    # Figures are of the steps since it went on, not of all steps so far.
    assert steps[3]["figures"]["bytes_to_host"] == pytest.approx(steps[2]["figures"]["bytes_to_host"], rel=0.5)
    third = make_engine(run, interval=1)
    train_step(third, [batch(1)])
    assert [record["step"] for record in read_run(run, "run").steps] == [1], "a new run in its place"


def test_a_line_that_was_cut_off_costs_no_other(tmp_path):
    for step in (1, 2):
        run_log.append(tmp_path, "step", step=step, figures={})
    file = tmp_path / run_log.FILE
    whole = file.read_bytes()
    for end in range(1, len(whole.splitlines()[1]) + 1):
        file.write_bytes(whole[: len(whole) - end])
        steps = [record["step"] for record in run_log.read(tmp_path)]
        assert steps == ([1, 2] if end == 1 else [1])
        run_log.append(tmp_path, "step", step=3)
        assert [record["step"] for record in run_log.read(tmp_path)] == [*steps, 3]
    file.write_bytes(whole + b'{"kind": "st\xff')
    assert len(run_log.read(tmp_path)) == 2
    file.write_text('[1]\n"step"\n{"no": "kind"}\n\n')
    assert run_log.read(tmp_path) == []


@pytest.mark.parametrize("last", ["", "raise KeyError('x')"])
def test_a_script_that_ends_says_how(tmp_path, last):
    code = (
        "import sys; from pathlib import Path; from meft_engine.run_log import RunLog\n"
        f"log = RunLog(Path({str(tmp_path)!r})); log.append('start', 0)\n"
        f"log.append('step', 7, tokens=1, seconds=1, figures={{}})\n{last}"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert kinds(tmp_path) == ["start", "step", "end"]
    end = of_kind(tmp_path, "end")[0]
    assert (end["step"], end["error"]) == (7, "KeyError" if last else None)
    assert read_run(tmp_path, "run").state() == ("failed" if last else "finished")


# --- a Trainer


def test_a_trainer_keeps_its_log_in_its_output_folder(tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in batch(1, size=16)]  # what it trains on
    trainer, _ = run_trainer(
        *(tmp_path, tiny_block(monitor={"interval": 2})),
        **{"report_to": [], "disable_tqdm": True, "max_steps": 5, "eval_strategy": "steps", "eval_steps": 3},
        **{"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, "learning_rate": 1e-2},
        **{"metric_for_best_model": "eval_loss", "greater_is_better": True},
        eval_dataset=data,
    )
    run = read_run(tmp_path, "run")
    # The "best" is loaded after the last step, and takes the engine back to its own.
    assert trainer.state.best_global_step == 3 and trainer.model_wrapped.global_steps == 3
    assert [record["step"] for record in run.steps] == [2, 4, 5] and run.last_step == 5
    assert run.state() == "finished" and run.resumes == 0
    assert [record["step"] for record in run.validations] == [3, 5]
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    evaluated = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert run.validations[0]["figures"]["eval_loss"] == evaluated
    assert run.start["model"] == "LlamaForCausalLM" and run.start["batch"]["samples_a_step"] == 4


def test_the_blocks_folder_comes_before_the_trainers(tmp_path):
    block = tiny_block(monitor={"interval": 2, "folder": str(tmp_path / "own")})
    (tmp_path / "trainer").mkdir()
    run_trainer(tmp_path / "trainer", block, report_to=[], disable_tqdm=True)
    assert "end" in kinds(tmp_path / "own") and not (tmp_path / "trainer" / run_log.FILE).exists()
