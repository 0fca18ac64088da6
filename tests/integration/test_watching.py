"""What a run shows of itself while it runs: monitors, Trainer's logs, timers, profiles, warnings."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft_engine
from meft_engine import phases
from meft_engine.phases import PhaseClock, phase, use_clock
from meft_engine.watching import Window
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, lm_loss, train_step

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
FIGURES = {
    *("loss", "lr", "grad_norm", "touched_share", "kept_mass", "dead_experts", "load_entropy"),
    *("bytes_to_device", "bytes_to_host", "host_memory_bytes", "device_memory_bytes"),
}
PHASES = {"forward", "route", "gather", "combine", "backward", "row_gradients", "norm", "optimizer", "update", "other"}


def make_engine(adapter: dict | None = None, sections: dict | None = None, **settings: Any) -> Any:
    engine = build_engine(tiny_llama(), tiny_block(adapter, **(sections or {})), adam=ADAM, stage=2, **settings)
    fill_values(engine.meft_adapters)
    return engine


# --- the figures, against what the adapters did


@pytest.mark.host_only  # rows that stay on a device do not cross twice
def test_figures_are_of_the_steps_since_the_last_reading():
    engine = make_engine(sections={"active_rows": {"cap": 20}, "optimizer": {"overlap": False}}, gas=2)
    window = Window(engine)
    train_step(engine, [batch(1), batch(2)])
    first = window.read()
    assert window.read() == {}, "no step, no figures"
    seen: dict[str, list[int]] = {"active": [], "experts": []}
    for adapter in engine.meft_adapters.adapters.values():
        adapter.values.rows_at, original = None, adapter.values.rows_at

        def rows_at(rows: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen["active"].append(rows.numel())
            return original(rows, *args, **kwargs)

        adapter.values.rows_at = rows_at
    losses = [train_step(engine, [batch(3), batch(4)]), train_step(engine, [batch(5), batch(6)])]
    found = window.read()
    assert FIGURES | {f"seconds/{name}" for name in PHASES} == found.keys() == first.keys()
    assert found["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert found["lr"] == 1e-2 and found["grad_norm"] == engine.get_global_grad_norm()
    # Each active row is read in the forward and again in the backward.
    assert len(seen["active"]) == 2 * 3 * 4
    assert found["touched_share"] == pytest.approx(sum(seen["active"]) / len(seen["active"]) / 35)
    assert found["bytes_to_device"] == sum(seen["active"]) * 32 * 4 / 2
    assert found["bytes_to_host"] == sum(seen["active"]) * 32 * 4 / 2, "of keys and of values, once"
    assert 0.3 < found["kept_mass"] < 1 and max(seen["active"]) == 20
    assert 0 < found["load_entropy"] <= 1 and found["dead_experts"] in {k / 15 for k in range(15)}
    assert found["host_memory_bytes"] > 10**8
    assert found["device_memory_bytes"] == engine.meft_report()["device_bytes"]


def test_a_loss_that_is_not_finite_spoils_one_window_and_no_other():
    engine = make_engine(clip=0.5)
    window = Window(engine)
    engine.backward(lm_loss(engine, batch(1)) * math.inf)
    engine.step()
    assert not engine.was_step_applied() and not math.isfinite(window.read()["loss"])
    loss = train_step(engine, [batch(2)])
    assert window.read()["loss"] == pytest.approx(loss)


def test_dead_experts_and_entropy_are_those_of_the_load():
    engine = make_engine()
    window = Window(engine)
    train_step(engine, [batch(1)])
    loads = [torch.tensor([6.0, 2, 0, 0, 0]), torch.full((5,), 3.0), torch.tensor([4.0, 4, 4, 4, 0])]
    for adapter, load in zip(engine.meft_adapters.adapters.values(), loads, strict=True):
        adapter.stats.load = load
    found = window.read()
    assert found["dead_experts"] == pytest.approx((3 / 5 + 0 + 1 / 5) / 3)
    entropies = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(5), math.log(4)]
    assert found["load_entropy"] == pytest.approx(sum(entropies) / 3 / math.log(5))


def test_loads_are_counted_on_in_long_runs():
    engine = make_engine()
    train_step(engine, [batch(1)])
    for adapter in engine.meft_adapters.adapters.values():
        adapter.stats.load += 2**30
    window = Window(engine)
    train_step(engine, [batch(2)])
    assert window.read()["load_entropy"] > 0.5


@pytest.mark.parametrize("overlap", [False, True])
def test_exposed_phases_sum_to_the_step(overlap):
    engine = make_engine({"rows": 350}, {"optimizer": {"overlap": overlap}}, gas=2)
    train_step(engine, [batch(1), batch(2)])
    window, start = Window(engine), time.perf_counter()
    for step in range(5):
        time.sleep(0.01)  # a data loader
        train_step(engine, [batch(step), batch(step + 1)])
    found = window.read()
    spent = (time.perf_counter() - start) / 5
    seconds = {name.removeprefix("seconds/"): value for name, value in found.items() if name.startswith("seconds/")}
    assert sum(seconds.values()) == pytest.approx(spent, rel=0.05)
    assert seconds["other"] > 0.009 and all(seconds[name] > 0 for name in PHASES)
    if not overlap:
        assert "wait" not in seconds, "a phase that a path does not have is absent"


def test_a_checkpoint_is_no_part_of_other_phases(tmp_path):
    engine = make_engine()
    train_step(engine, [batch(1)])
    window, start = Window(engine), time.perf_counter()
    engine.save_checkpoint(str(tmp_path))
    engine.save_adapter(tmp_path / "adapter")
    spent = time.perf_counter() - start
    train_step(engine, [batch(2)])
    found = window.read()
    assert found["seconds/save"] == pytest.approx(spent, rel=0.1) and found["seconds/other"] < spent / 2


def test_waiting_for_an_update_shows_as_such():
    engine = make_engine(sections={"optimizer": {"overlap": True}})
    train_step(engine, [batch(1)])
    original = type(engine.row_optimizer).updates

    def slowly(*args: Any) -> list:
        found = original(engine.row_optimizer, *args)
        for update in found:
            run = update.run
            vars(update)["run"] = lambda beat, run=run: (time.sleep(0.05), run(beat))
        return found

    engine.row_optimizer.updates = slowly
    window = Window(engine)
    train_step(engine, [batch(2)])
    train_step(engine, [batch(3)])
    assert window.read()["seconds/wait"] > 0.1


def test_a_backward_of_the_scripts_own_is_charged_too():
    engine = make_engine()
    window = Window(engine)
    lm_loss(engine, batch(1)).backward()
    engine.step()
    found = window.read()
    assert found["seconds/backward"] > 0 and found["seconds/row_gradients"] > 0
    assert "loss" not in found, "the engine has not seen it"


def test_phases_are_exclusive_and_survive_errors(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    clock = PhaseClock()
    use_clock(clock)
    try:
        with pytest.raises(KeyError), phase("outer"):
            passes(2)
            with phase("inner"):
                passes(3)
                raise KeyError
        passes(0.5)
        clock.begin("left open")
        passes(7)
        clock.begin("inner")
        passes(11)
        clock.end("left open")
        clock.end("never begun")
        passes(0.25)
        found = clock.seconds()
    finally:
        use_clock(None)
    assert found == {"outer": 2, "inner": 14, "left open": 7, "other": 0.75}
    assert not clock.is_open("inner") and not clock.is_open("left open")


# --- DeepSpeed's monitors


def monitored(tmp_path: Path) -> dict[str, Any]:
    return {
        kind: {"enabled": True, "output_path": str(tmp_path / kind), "job_name": "run"}
        for kind in ("tensorboard", "csv_monitor")
    }


def test_monitors_hold_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine = make_engine(sections={"monitor": {"interval": 2}}, **monitored(tmp_path))
    norms, losses = [], []
    for step in range(6):
        losses.append(train_step(engine, [batch(step % 2)]))
        norms.append(engine.get_global_grad_norm())
    engine.monitor.tb_monitor.summary_writer.flush()
    names = FIGURES | {f"seconds/{name}" for name in PHASES}

    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    scalars = {name: events.Scalars(f"Train/MEFT/{name}") for name in names}
    for name, points in scalars.items():
        assert [point.step for point in points] == [8, 16, 24], name
    assert [point.value for point in scalars["grad_norm"]] == pytest.approx(norms[1::2], rel=1e-5)
    pairs = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [point.value for point in scalars["loss"]] == pytest.approx(pairs, rel=1e-5)

    for name, points in scalars.items():
        file = tmp_path / "csv_monitor" / "run" / f"Train_MEFT_{name.replace('/', '_')}.csv"
        header, *lines = list(csv.reader(file.open()))
        assert header[0] == "step" and [int(step) for step, _ in lines] == [8, 16, 24]
        assert [float(value) for _, value in lines] == pytest.approx([p.value for p in points], rel=1e-5)


# --- the Trainer's logs


class Records(TrainerCallback):
    """What a ``report_to`` integration gets to see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def run_trainer(
    folder: Path, block: dict[str, Any], eval_dataset: Any = None, **options: Any
) -> tuple[Trainer, Records]:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    open_values = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    config = {**open_values, "zero_optimization": {"stage": 2}, "meft": block}
    (folder / "ds_config.json").write_text(json.dumps(config))
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **options}
    meft_engine.enable()
    try:
        args = TrainingArguments(str(folder), deepspeed=str(folder / "ds_config.json"), use_cpu=True, **settings)
        data = [{"input_ids": ids, "labels": ids} for ids in batch(1, size=16)]
        records = Records()
        trainer = Trainer(tiny_llama(), args, train_dataset=data, eval_dataset=eval_dataset, callbacks=[records])
        trainer.train()
    finally:
        meft_engine.disable()
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
    return trainer, records


def test_report_to_and_the_log_history_get_every_figure(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer, records = run_trainer(tmp_path, tiny_block(), report_to=["tensorboard"], disable_tqdm=True)
    names = FIGURES - {"loss", "lr", "grad_norm"} | {f"seconds/{name}" for name in PHASES}
    expected = {f"meft/{name}" for name in names} | {"loss", "learning_rate", "grad_norm"}
    with_loss = [entry for entry in records.logs if "loss" in entry]
    assert len(with_loss) == 2 and all(expected <= entry.keys() for entry in with_loss)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2 and all(expected <= entry.keys() for entry in history)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {f"train/meft/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("train/meft/touched_share")] == [2, 4]
    printed = capsys.readouterr().out
    assert "'loss'" in printed and "meft/" not in printed, "the screen is spared"


def test_a_trainer_without_a_block_logs_what_it_always_does(tmp_path):
    trainer, records = run_trainer(tmp_path, {"enabled": False}, report_to=[], disable_tqdm=True)
    assert len([entry for entry in records.logs if "loss" in entry]) == 2
    assert not any("meft" in key for entry in [*records.logs, *trainer.state.log_history] for key in entry)


# --- timers, profiles, warnings


@pytest.fixture
def log(caplog):
    """The project's own log, whatever other tests have done to it."""
    logger = logging.getLogger("meft_engine")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    yield caplog
    logger.setLevel(level)
    logger.propagate = propagate


def test_wall_clock_breakdown_shows_the_phases(log):
    engine = make_engine(wall_clock_breakdown=True, steps_per_print=2)
    for step in range(4):
        train_step(engine, [batch(step)])
    lines = [record.message for record in log.records if record.message.startswith("MEFT time (ms)")]
    assert len(lines) == 2
    for name in PHASES:
        assert f"| {name}: " in lines[0]
    silent = make_engine(steps_per_print=1)
    log.clear()
    train_step(silent, [batch(1)])
    assert not [record for record in log.records if "MEFT time" in record.message]


def test_phases_have_their_names_in_a_profile():
    engine = make_engine()
    train_step(engine, [batch(1)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(engine, [batch(2)])
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["meft::route"] == counts["meft::combine"] == counts["meft::row_gradients"] == 3
    assert {"meft::forward", "meft::gather", "meft::norm", "meft::optimizer", "meft::update"} <= counts.keys()


def test_a_cap_that_drops_much_is_warned_of_once(log):
    engine = make_engine(sections={"active_rows": {"cap": 5}, "monitor": {"interval": 1}})
    for step in range(3):
        train_step(engine, [batch(step)])
    warnings = [record.message for record in log.records if record.levelno == logging.WARNING]
    told = [message for message in warnings if "active_rows.cap = 5 dropped" in message]
    assert len(told) == 1 and "raise the cap" in told[0] and "monitor.min_kept_mass = 0.9" in told[0]


def test_dead_experts_are_warned_of_once(log):
    engine = make_engine({"rows": 320, "num_experts": 160}, {"monitor": {"interval": 1, "max_dead_experts": 0.2}})
    for step in range(3):
        train_step(engine, [batch(step)])
    warnings = [record.message for record in log.records if record.levelno == logging.WARNING]
    told = [message for message in warnings if "of the experts were chosen by no token" in message]
    assert len(told) == 1 and 'router.balance = "loss" or "bias"' in told[0]


def test_a_healthy_run_is_not_warned_of(log):
    engine = make_engine(sections={"monitor": {"interval": 1}})
    for step in range(3):
        train_step(engine, [batch(step)])
    assert not [record for record in log.records if record.levelno == logging.WARNING]
