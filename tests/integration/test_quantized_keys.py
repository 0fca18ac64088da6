"""The engine with keys in 8 bits: every step is the reference's over the rows as the model reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meft_kernels.quantized import QuantizedRows
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, lm_loss, masters, row_gradients, tables, train_step
from tests.integration.oracles import reference_twin, twin_parts, twin_rows


def quantized(source: Tensor) -> QuantizedRows:
    rows = QuantizedRows.zeros(source.shape, "cpu")
    rows.put(slice(None), source)
    return rows


def test_every_step_is_the_references_over_the_rows_as_they_are_read():
    engine = build_engine(tiny_llama(), tiny_block(offload={"keys_dtype": "int8"}))
    fill_values(engine.meft_adapters)
    for step in range(3):
        twin = reference_twin(tiny_llama(), engine)
        for name, part in twin_parts(twin, "keys").items():
            exact = quantized(part.detach()).float()
            assert not torch.equal(exact, part)
            assert torch.equal(tables(engine)[name].compute_copy().float(), exact)
            part.data.copy_(exact)
        loss, expected = lm_loss(engine, batch(step)), lm_loss(twin, batch(step))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        engine.backward(loss)
        expected.backward()
        parts = twin_rows(twin)
        for name, (rows, grads) in row_gradients(engine).items():
            torch.testing.assert_close(grads, parts[name].grad[rows], rtol=1e-3, atol=1e-6)
        engine.step()
    engine.destroy()


def test_masters_are_none_the_wiser():
    """They are kept and updated in full, and are what is saved."""
    engine = build_engine(tiny_llama(), tiny_block(offload={"keys_dtype": "int8"}))
    before = masters(engine)
    assert not any(torch.equal(quantized(rows).float(), rows) for name, rows in before.items() if "keys" in name)
    train_step(engine, [batch(0)])
    assert any(not torch.equal(rows, before[name]) for name, rows in masters(engine).items())
    assert engine.meft_report()["device_bytes"] > 0
    engine.destroy()
