"""The engine over a device whose copies end late: the numbers are those of a host that waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, lm_loss, masters, router_values, train_step
from tests.late_copies import use_late_device

ONE, THREE, BF16 = {}, {"gas": 3, "clip": 0.5}, {"gas": 3, "bf16": True}
# Settings, overlap, offload, and whether rows are read in place and copies made early.
CASES = {
    "own slots": (ONE, False, {}, True, False),
    "own slots, staged, early": (THREE, False, {}, False, True),
    "shared slots, some gradients, early": (THREE, True, {"slot_bytes": 0, "grad_slot_bytes": 8_000}, True, True),
    "shared slots, some gradients, staged": (ONE, True, {"slot_bytes": 0, "grad_slot_bytes": 8_000}, False, False),
    "some slots, all gradients": (THREE, True, {"slot_bytes": 3_000, "grad_slot_bytes": 10**9}, True, False),
    "some slots, all gradients, staged, early": (
        ONE,
        False,
        {"slot_bytes": 3_000, "grad_slot_bytes": 10**9},
        False,
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case, monkeypatch):
    """One micro-batch and three, updates beside the next forward or not, every way that rows and gradients travel."""
    settings, overlap, offload, in_place, early = CASES[case]
    block = tiny_block(optimizer={"overlap": overlap}, offload=offload)
    compare(block, settings, monkeypatch, in_place=in_place, early=early)


def test_gradients_on_the_device_leave_it_as_the_last_micro_steps_backward_does(monkeypatch):
    """And not before; when the step begins, they are on their way."""
    use_late_device(monkeypatch.setattr)
    engine = build_engine(tiny_llama(), tiny_block(offload={"grad_slot_bytes": 10**9}), gas=2)
    tables, crossed = engine.meft_adapters.tables(), []
    for micro_step in range(2):
        engine.backward(lm_loss(engine, batch(micro_step)))
        for table in tables:
            table.finish_sending()
        crossed.append([table.bytes_to_host for table in tables])
        engine.step()
    assert not any(crossed[0]) and all(crossed[1])
    assert [table.bytes_to_host for table in tables] == crossed[1]
    engine.destroy()


def test_rows_that_are_brought_to_date_for_each_reader(monkeypatch):
    """Their idle neighbours are behind, so that none of them can be read where it lies."""
    compare(tiny_block(optimizer={"mode": "dense_equivalent"}), {"gas": 2}, monkeypatch)


@pytest.mark.parametrize(
    "offload",
    [{"keys": "host"}, {"keys": "host", "slot_bytes": 5_000}, {"keys_dtype": "int8", "slot_bytes": 0}],
    ids=str,
)
def test_keys_elsewhere_and_in_eight_bits(offload, monkeypatch):
    block = tiny_block(optimizer={"overlap": True}, offload={**offload, "grad_slot_bytes": 5_000})
    compare(block, {"gas": 2, "bf16": True}, monkeypatch)


# Settings, overlap, offload and precision of moments; and as above.
OWNED = {
    "some rows": (ONE, False, {"resident_bytes": 50_000}, "fp32", True, False),
    "some rows, staged": (BF16, True, {"resident_bytes": 50_000}, "bf16", False, False),
    "some rows, shared slots, early": (
        BF16,
        True,
        {"resident_bytes": 50_000, "slot_bytes": 0, "grad_slot_bytes": 8_000, "keys_dtype": "int8"},
        "fp32",
        True,
        True,
    ),
    "all rows": (BF16, True, {"resident_bytes": 10**9}, "fp32", True, False),
    "all rows, shared slots, staged, early": (
        ONE,
        False,
        {"resident_bytes": 10**9, "slot_bytes": 0, "grad_slot_bytes": 10**9},
        "bf16",
        False,
        True,
    ),
}


@pytest.mark.parametrize("case", OWNED)
def test_rows_that_the_device_owns(case, monkeypatch):
    """They come and go, and it is as if they did not."""
    settings, overlap, offload, moments, in_place, early = OWNED[case]
    monkeypatch.setattr("meft_engine.offload.hot_rows.STEPS_BETWEEN_CHOICES", 2)
    block = tiny_block(optimizer={"overlap": overlap, "moments_dtype": moments}, offload=offload)
    gone = compare(block, settings, monkeypatch, in_place=in_place, early=early)
    assert gone > 0 or case.startswith("all")


def compare(block: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **kind: bool) -> int:
    """Train on a device that is late and on none, and hold one against the other, bit for bit.

    Returns:
        How many rows the device owned for some time and then no longer.
    """
    results = []
    for late in (False, True):
        if late:
            use_late_device(monkeypatch.setattr, **kind)
        engine = build_engine(tiny_llama(num_hidden_layers=3), block, **settings)
        per_step = settings.get("gas", 1)
        losses = [train_step(engine, [batch(per_step * step + i) for i in range(per_step)]) for step in range(6)]
        results.append((losses, masters(engine), router_values(engine)))
        begun = engine.meft_adapters.traffic[0].slots.copies.begun if late else 0
        gone = sum(hot.demoted for hot in engine.meft_adapters.hot_rows())
        engine.destroy()
    (losses, rows, routers), (late_losses, late_rows, late_routers) = results
    assert begun > 100
    assert losses == late_losses
    assert all(torch.equal(late_rows[name], found) for name, found in rows.items())
    assert all(torch.equal(late_routers[name], found) for name, found in routers.items())
    return gone
