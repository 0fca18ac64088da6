"""Updates on a thread of their own change nothing but the time: overlap on equals overlap off, bit for bit.

The model has little arithmetic and many rows, so that updates are still running when the next forward comes.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft_engine.checkpoint import saver
from meft_engine.optim.sparse_adam import RowUpdate
from meft_engine.optim.worker import UpdateError
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, differing, full_state, lm_loss, train_step

STEPS, GAS = 200, 2
ADAM = {"lr": 5e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


def make(overlap: bool, optimizer: dict[str, Any] | None = None, bf16: bool = True, **settings: Any) -> Any:
    adapter = {"rows": 4096, "num_experts": 64, "experts_per_token": 4, "top_k": 64}
    block = tiny_block(adapter, optimizer={"overlap": overlap, **(optimizer or {})})
    return build_engine(tiny_llama(), block, stage=2, bf16=bf16, gas=GAS, clip=0.5, adam=ADAM, **settings)


def run(engine: Any, steps: int, folder: Path | None = None, start: int = 0) -> list[tuple]:
    """Training with evaluation, saves and exports in between; for every step the loss and the norm."""
    curve = []
    for step in range(start, start + steps):
        loss = train_step(engine, [batch(GAS * step + i, size=3, length=7) for i in range(GAS)])
        curve.append((loss, float(engine.get_global_grad_norm())))
        if step % 9 == 4:
            engine.eval()
            with torch.no_grad():
                curve.append((lm_loss(engine, batch(9999)).item(),))
            engine.train()
        if folder is not None and step % 60 == 31:
            engine.save_checkpoint(str(folder), tag=f"at{step}")
        if folder is not None and step % 60 == 40:
            engine.save_adapter(folder / f"adapter{step}")
    return curve


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every update begin late, and some end late, by random times."""
    original, chance = RowUpdate.run, random.Random(3)

    def late(self: RowUpdate, beat: Any = lambda: None) -> None:
        time.sleep(chance.random() * seconds)
        original(self, beat)
        time.sleep(chance.random() * seconds * chance.randrange(2))

    monkeypatch.setattr(RowUpdate, "run", late)


@pytest.fixture(scope="module")
def without_overlap(tmp_path_factory):
    engine = make(False)
    curve = run(engine, STEPS, tmp_path_factory.mktemp("off"))
    return curve, full_state(engine)


def test_two_hundred_steps_are_equal(without_overlap, tmp_path):
    engine = make(True)
    curve = run(engine, STEPS, tmp_path)
    assert curve == without_overlap[0]
    assert differing(full_state(engine), without_overlap[1]) == []
    norms = [entry[1] for entry in curve if len(entry) == 2]
    assert min(norms) < 0.5 < max(norms), "clipping must bind at some steps and not at others"


@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
@pytest.mark.parametrize(("moments", "bf16"), [("fp32", True), ("bf16", True), ("fp32", False)])
def test_a_late_worker_changes_nothing(mode, moments, bf16, monkeypatch, tmp_path):
    options = {"mode": mode, "moments_dtype": moments}
    plain = make(False, options, bf16)
    expected = run(plain, 12)
    slow_down(monkeypatch, 0.02)
    engine = make(True, options, bf16)
    assert run(engine, 12, tmp_path) == expected
    assert differing(full_state(engine), full_state(plain)) == []


@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_resuming_with_overlap_is_exact(mode, moments, monkeypatch, tmp_path):
    """The uninterrupted run saves nothing: neither the save nor the load may leave a trace."""
    options = {"mode": mode, "moments_dtype": moments}
    through = make(True, options)
    whole = run(through, 20)
    slow_down(monkeypatch, 0.01)
    first = make(True, options)
    run(first, 11)
    first.save_checkpoint(str(tmp_path))
    second = make(True, options)
    second.load_checkpoint(str(tmp_path))
    rest = run(second, 9, start=11)
    assert rest == whole[len(whole) - len(rest) :]
    assert differing(full_state(second), full_state(through)) == []


def fail(self: RowUpdate, beat: Any) -> None:
    raise OSError("the disk under the swap is gone")


def leave(self: RowUpdate, beat: Any) -> None:
    raise SystemExit(3)


def hang(self: RowUpdate, beat: Any) -> None:
    time.sleep(30)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(fail, "the disk under the swap is gone"), (leave, "SystemExit: 3"), (hang, r"sign of life(.|\n)*time.sleep")],
)
def test_a_dead_worker_stops_the_training(fault, message, monkeypatch, tmp_path):
    engine = make(True, {"worker_timeout": 0.5})
    run(engine, 2)
    monkeypatch.setattr(RowUpdate, "run", fault)
    began = time.monotonic()
    with pytest.raises(UpdateError, match=message):
        run(engine, 2, start=2)
    assert time.monotonic() - began < 5
    for use in (
        engine.eval,
        lambda: engine.save_checkpoint(str(tmp_path)),
        lambda: engine.save_adapter(tmp_path / "a"),
    ):
        with pytest.raises(UpdateError, match=message):
            use()
    assert not list(tmp_path.iterdir()), "nothing is saved of rows that are damaged"


def test_staleness_is_an_option_that_is_counted(monkeypatch):
    """A late worker lets forwards read rows one step old; evaluation does not; the report says how often."""
    fresh = make(True)
    run(fresh, 4)
    assert fresh.meft_report()["stale_reads"] == 0
    engine = make(True, {"max_staleness": 1})
    slow_down(monkeypatch, 0.05)
    for step in range(6):
        train_step(engine, [batch(step, size=3, length=7)] * GAS)
    assert 0 < engine.meft_report()["stale_reads"] < 1
    late = engine.meft_report()["stale_reads"]
    engine.eval()
    with torch.no_grad():
        lm_loss(engine, batch(1))
    assert engine.meft_report()["stale_reads"] < late


def test_destroying_the_engine_ends_the_thread_and_returns_the_memory():
    engine = make(True)
    run(engine, 2)
    thread, tables = engine._row_step.worker._thread, engine.meft_adapters.tables()
    assert thread.is_alive()
    engine.destroy()
    assert not thread.is_alive()
    assert all(table.host_bytes() == 0 for table in tables)


def test_memory_is_returned_though_the_last_figures_cannot_be_read(monkeypatch):
    engine = make(True)
    run(engine, 1)
    thread, tables = engine._row_step.worker._thread, engine.meft_adapters.tables()

    def fail() -> None:
        raise OSError("nothing can be read")

    monkeypatch.setattr(engine._watch, "finish", fail)
    with pytest.raises(OSError, match="nothing can be read"):
        engine.destroy()
    assert not thread.is_alive()
    assert all(table.host_bytes() == 0 for table in tables)


def test_the_memory_for_copies_is_a_quarter_of_what_a_container_leaves(monkeypatch):
    monkeypatch.setattr(saver, "host_limit", lambda: SimpleNamespace(bytes=40_000))
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"async_save": True}))
    assert 0 < engine._saver._memory.nbytes <= 10_000
    engine.destroy()


def test_a_forgotten_engine_leaves_no_thread():
    engine = make(True)
    run(engine, 1)
    thread, row_step = engine._row_step.worker._thread, engine._row_step
    engine._row_step = None
    assert thread.is_alive()
    del row_step
    thread.join(timeout=5)
    assert not thread.is_alive()
