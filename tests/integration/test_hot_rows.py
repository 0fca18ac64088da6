"""The engine with rows that the device owns, over a device whose copies are late: clipping, saves, what crosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import tiny_block, tiny_llama
from tests.integration.engines import (
    batch,
    build_engine,
    differing,
    full_state,
    largest_difference,
    lm_loss,
    masters,
    tables,
    train_step,
)
from tests.late_copies import use_late_device

SOME, ALL = 50_000, 10**9


@pytest.fixture(autouse=True)
def _often(monkeypatch) -> None:
    """Rows are chosen after every step."""
    monkeypatch.setattr("meft_engine.offload.hot_rows.STEPS_BETWEEN_CHOICES", 1)


def make_engine(resident_bytes: int, *, background: bool = False, **settings: Any) -> Any:
    block = tiny_block(
        optimizer={"overlap": True, "moments_dtype": "bf16"},
        offload={"resident_bytes": resident_bytes},
        checkpoint={"async_save": background},
    )
    return build_engine(tiny_llama(), block, **{"gas": 2, "bf16": True, **settings})


def run(engine: Any, steps: range) -> list[float]:
    return [train_step(engine, [batch(2 * step), batch(2 * step + 1)]) for step in steps]


@pytest.mark.parametrize("background", [False, True], ids=["", "async"])
@pytest.mark.parametrize("before, after", [(SOME, SOME), (ALL, 0), (0, ALL)])
def test_a_save_is_resumed_with_more_or_fewer_of_them(before, after, background, tmp_path, monkeypatch):
    """Bit for bit as a host that trains on."""
    plain = make_engine(0)
    losses, at_save = run(plain, range(4)), full_state(plain)
    losses += run(plain, range(4, 7))

    use_late_device(monkeypatch.setattr)
    first = make_engine(before, background=background)
    assert run(first, range(4)) == losses[:4]
    first.save_checkpoint(str(tmp_path))
    assert run(first, range(4, 7)) == losses[4:]  # meanwhile
    first.destroy()

    second = make_engine(after)
    run(second, range(20, 23))
    second.load_checkpoint(str(tmp_path))
    assert differing(full_state(second), at_save) == []
    assert run(second, range(4, 7)) == losses[4:]
    assert differing(full_state(second), full_state(plain)) == []
    second.destroy()


def test_clipping_differs_by_the_rounding_of_the_norm(monkeypatch):
    settings = {"bf16": False, "clip": 0.05}
    plain = make_engine(0, **settings)
    losses, rows = run(plain, range(5)), masters(plain)
    norm = float(plain.get_global_grad_norm())
    use_late_device(monkeypatch.setattr)
    hot = make_engine(SOME, **settings)
    assert run(hot, range(5)) == pytest.approx(losses, rel=1e-5)
    assert float(hot.get_global_grad_norm()) == pytest.approx(norm, rel=1e-5) and norm > 0.05
    assert largest_difference(masters(hot), rows) < 1e-4
    hot.destroy()


def test_once_they_are_there_nothing_of_them_crosses(monkeypatch):
    use_late_device(monkeypatch.setattr)
    engine = make_engine(ALL)
    # Until every row that these batches touch has been touched.
    for _ in range(12):
        run(engine, range(2))
    before, moved = engine.meft_report()["traffic"], masters(engine)
    owned = [hot.rows.numel() for hot in engine.meft_adapters.hot_rows()]
    run(engine, range(2))
    assert [hot.rows.numel() for hot in engine.meft_adapters.hot_rows()] == owned and min(owned) > 10
    after = engine.meft_report()["traffic"]
    assert (after["to_device_bytes"], after["to_host_bytes"]) == (before["to_device_bytes"], before["to_host_bytes"])
    assert after["hits"] > before["hits"] and after["misses"] == before["misses"]
    assert largest_difference(masters(engine), moved) > 0
    engine.destroy()


def test_evaluation_exports_and_tables_see_them(tmp_path, monkeypatch):
    plain = make_engine(0)
    run(plain, range(3))
    use_late_device(monkeypatch.setattr)
    hot = make_engine(SOME)
    run(hot, range(3))
    found = []
    for engine in (plain, hot):
        engine.eval()
        with torch.no_grad():
            loss = lm_loss(engine, batch(9)).item()
        engine.train()
        engine.save_adapter(tmp_path / "adapter")
        found.append((loss, {file.name: file.read_bytes() for file in (tmp_path / "adapter").glob("*.safetensors")}))
    assert found[0] == found[1] and found[0][1]
    assert all(torch.equal(t.planes()[0], tables(plain)[name].planes()[0]) for name, t in tables(hot).items())
    hot.destroy()


@pytest.mark.host_only
def test_where_device_and_host_are_one_they_mean_nothing():
    engine = make_engine(ALL)
    assert engine.meft_adapters.hot_rows() == [] and engine.meft_report()["device_bytes_by_kind"]["hot_rows"] == 0
    engine.destroy()
