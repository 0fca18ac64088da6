"""Keys in 8 bits: what is stored, and that adapters compute with exactly that."""

from __future__ import annotations

import pytest
import torch

from meft_kernels import reference, sparse
from meft_kernels.cpu import build, native_sparse
from meft_kernels.quantized import QuantizedRows
from meft_kernels.sparse import RowsAt

PASSES = [sparse] if build.library() is None else [sparse, native_sparse]


def quantized(source: torch.Tensor) -> QuantizedRows:
    rows = QuantizedRows.zeros(source.shape, "cpu")
    rows.put(slice(None), source)
    return rows


def test_elements_are_off_by_half_a_step_at_most():
    source = torch.randn(50, 33) * torch.logspace(-6, 6, 50)[:, None]
    rows = quantized(source)
    steps = source.abs().amax(1, keepdim=True).double() / 127
    assert ((rows.float().double() - source).abs() <= steps * 0.5001).all()
    assert torch.equal(rows.codes.abs().amax(1), torch.full((50,), 127, dtype=torch.int8))
    assert rows.nbytes == 50 * 33 + 50 * 4
    again = quantized(rows.float())
    assert torch.equal(again.codes, rows.codes)


def test_zeros_and_numbers_that_are_none():
    source = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0], [-2.0, 1.0]])
    found = quantized(source).float()
    assert found[0].tolist() == [0.0, 0.0] and found[1:3].isnan().all()
    assert found[3].tolist() == pytest.approx([-2.0, 1.0], rel=0.01)


def test_some_rows_are_set_and_read():
    rows = quantized(torch.zeros(9, 4))
    some, source = torch.tensor([7, 2]), torch.tensor([[127.0, -3, 0, 1], [254.0, 2, 4, -6]])
    rows.put(some, source)
    assert torch.equal(
        rows.index_select(0, torch.tensor([2, 3, 7])), torch.stack((source[1], torch.zeros(4), source[0]))
    )
    assert torch.equal(rows[6:8], torch.stack((torch.zeros(4), source[0])))


@pytest.mark.parametrize("passes", PASSES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_passes_compute_with_what_the_codes_say(passes):
    """Selections and scores are the reference's over the rows as they are read."""
    torch.manual_seed(5)
    keys, values = quantized(torch.randn(40, 16)), torch.randn(40, 16)
    h, router = torch.randn(11, 16), torch.randn(8, 16)
    given = passes.inputs(h, None)
    chosen = passes.choose_experts(given, router, 2, "softmax", None)
    selection, raw, _ = passes.choose_rows(given, keys, chosen, top_k=3, cap=None)
    leaves = [tensor.double().requires_grad_() for tensor in (h, keys.float(), values, router)]
    y, expected = reference.adapter(*leaves, experts_per_token=2, top_k=3, gate="softmax")
    assert torch.equal(selection.active, expected.active)
    at = RowsAt(values, selection.active), RowsAt(keys, selection.active)
    found = passes.combine_rows(raw * passes.picked_gates(chosen.gates, selection), at[0], selection)
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(passes.score_picks(given.x, at[1], selection), raw, rtol=1e-5, atol=1e-5)
    y.backward(torch.ones_like(y))
    back = passes.gradients(torch.ones(11, 16), given, raw, chosen.gates, *at, selection)
    torch.testing.assert_close(back.keys.double(), leaves[1].grad[selection.active], rtol=1e-4, atol=1e-5)
