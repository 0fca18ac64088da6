"""Triton's passes as the engine calls them: beside PyTorch's, and in a whole training."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.sparse import RowsAt, Selection
from meft_kernels.triton import passes
from meft_kernels.triton.check import fault
from meft_kernels.triton.combine import combine
from tests.families import tiny_block, tiny_llama
from tests.integration.conftest import _deepspeed  # noqa: F401
from tests.integration.engines import batch, build_engine, masters, router_values, train_step
from tests.kernels.interpreted.cases import KINDS, SHAPES, drawn
from tests.late_copies import use_late_device


def picked(selection: Selection, raw: Tensor) -> list[list[tuple[int, int, float]]]:
    """Row, slot and score of each token's picks, wherever they stand in their line."""
    return [
        [
            (int(selection.active[selection.picks[t, k]]), int(selection.slots[t, k]), float(raw[t, k]))
            for k in line.nonzero().flatten().tolist()
        ]
        for t, line in enumerate(selection.valid)
    ]


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 4])
def test_beside_pytorch(shape, kind, cap):
    case = drawn(shape, kind)
    center = torch.linspace(-1, 1, shape.width).mul(8).round().div(8)
    results = []
    for module in (passes, sparse):
        given = module.inputs(case.h, center)
        chosen = module.choose_experts(given, case.router, shape.per_token, "sigmoid", None)
        selection, raw, overflow = module.choose_rows(given, case.keys, chosen, top_k=shape.top_k, cap=cap)
        tables = [RowsAt(table, selection.active) for table in (case.values, case.keys)]
        grad_y = torch.ones(shape.tokens, shape.width)
        back = module.gradients(grad_y, given, raw, chosen.gates, *tables, selection)
        y = module.combine_rows(raw * module.picked_gates(chosen.gates, selection), tables[0], selection)
        again = module.score_picks(given.x, tables[1], selection)
        torch.testing.assert_close(again, torch.where(selection.valid, raw, 0), rtol=1e-5, atol=1e-4, equal_nan=True)
        found = int(selection.number)
        selection = replace(selection, active=selection.active[:found])
        back = back._replace(values=back.values[:found], keys=back.keys[:found])
        results.append((chosen, selection, raw, overflow, y, back))
    (chosen, selection, raw, overflow, y, back), (chosen2, selection2, raw2, overflow2, y2, back2) = results
    assert torch.equal(chosen.experts, chosen2.experts) and torch.equal(chosen.counts.long(), chosen2.counts)
    assert torch.equal(selection.active, selection2.active)
    assert not selection.picks[~selection.valid].any() and not selection.slots[~selection.valid].any()
    assert picked(selection, raw) == picked(selection2, raw2)
    assert overflow.wanted_rows == overflow2.wanted_rows
    found, expected = (
        (overflow.mass, overflow.kept_mass, y, *back[:4]),
        (overflow2.mass, overflow2.kept_mass, y2, *back2[:4]),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_small_layer_shows_whether_the_kernels_work(monkeypatch):
    """What `fault` finds where nothing is wrong, where a kernel errs, and where one cannot be compiled."""
    cpu = torch.device("cpu")
    assert fault(cpu) is None
    with monkeypatch.context() as patch:
        patch.setattr(passes, "combine", lambda *args, **named: combine(*args, **named) * 1.01)
        assert fault(cpu) == "the output differs from what PyTorch finds"
    with monkeypatch.context() as patch:
        patch.setattr(passes, "keep_largest", lambda active, activations, cap: active)
        assert fault(cpu) == "the choice of rows differs from what PyTorch finds"

    def no_compiler(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(passes, "pick", no_compiler)
    assert fault(cpu) == "RuntimeError: Failed to find C compiler."


@pytest.mark.parametrize(
    ("steps", "settings", "offload"),
    [
        (10, {}, None),
        (4, {"gas": 2, "clip": 0.5}, None),
        (3, {"gas": 2}, {"slot_bytes": 0, "grad_slot_bytes": 6_000}),
        (2, {"gas": 2}, {"keys_dtype": "int8"}),
    ],
    ids=["one micro-batch", "two", "rows that visit a device", "rows that stay there"],
)
def test_the_engine_trains_as_on_the_cpu(steps, settings, offload, monkeypatch):
    """With all that a device adds, too: slots, gradients that stay there, and numbers of rows that only it knows."""

    def run(which: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        monkeypatch.setitem(os.environ, "MEFT_TOKEN_PASSES", which)
        if which == "triton" and offload is not None:
            use_late_device(monkeypatch.setattr, late_passes=None)
        block = tiny_block(active_rows={"cap": 12}, offload=offload or {})
        engine = build_engine(tiny_llama(num_hidden_layers=2), block, **settings)
        per_step = settings.get("gas", 1)
        losses = [
            train_step(engine, [batch(per_step * step + i, size=2, length=7) for i in range(per_step)])
            for step in range(steps)
        ]
        state = masters(engine), router_values(engine)
        engine.destroy()
        return losses, *state

    expected, expected_rows, expected_routers = run("auto")
    losses, rows, routers = run("triton")
    assert len(set(expected)) == steps
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, found in {**rows, **routers}.items():
        torch.testing.assert_close(found, {**expected_rows, **expected_routers}[name], rtol=1e-3, atol=1e-4)
