"""The compiled passes over tokens at widths at which every one of their loops runs, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.cpu import build as building
from meft_kernels.cpu import native_sparse
from meft_kernels.sparse import Inputs, RowsAt, Selection

WIDTHS = [1, 8, 31, 32, 64, 129, 577]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["native", "portable"], autouse=True)
def _library(request, compiled_passes):
    library = building.build(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_sparse, "library", lambda: library)
        yield


def drawn(tokens: int, rows: int, top_k: int, width: int, dtype: torch.dtype) -> tuple[Selection, Tensor, Tensor]:
    """A selection of random rows with some picks missing, and two tables [r, d]."""
    ids = torch.stack([torch.randperm(rows)[:top_k].sort().values for _ in range(tokens)])
    valid = torch.rand(tokens, top_k) < 0.8
    active = ids[valid].unique()
    picks = torch.where(valid, torch.searchsorted(active, ids), 0)
    slots = torch.where(valid, torch.randint(3, ids.shape), 0)
    selection = Selection(torch.zeros(tokens, 3, dtype=torch.int64), active, picks, slots, valid)
    return selection, *(torch.randn(rows, width).to(dtype) for _ in range(2))


def near(found: Tensor, expected: Tensor, terms: int) -> bool:
    """As near as fp32 sums of so many terms of size one are."""
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-6 * terms**0.5 * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("experts", "size"), [(1, 7), (5, 1), (3, 4), (2, 13)])
def test_scores(width, dtype, experts, size):
    """Of few and of many tokens an expert, none of them included."""
    keys = torch.randn(experts * size, width).to(dtype)
    for tokens in (0, 1, 2, 3, 150):
        x = torch.randn(tokens, width)
        per_token = min(2, experts)
        chosen = torch.stack([torch.randperm(experts)[:per_token] for _ in range(tokens)] or [torch.empty(0, 1).long()])
        chosen = chosen.sort().values.view(tokens, per_token)
        found = native_sparse.score_experts(x, keys, chosen, experts)
        rows = keys.double().view(experts, size, width)[chosen]
        expected = torch.einsum("td,tned->tne", x.double(), rows)
        assert found.shape == (tokens, per_token, size) and near(found, expected, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_picks_and_the_way_back(width, dtype):
    selection, keys, values = drawn(37, 50, 9, width, dtype)
    x, grad_y, scores = torch.randn(37, width), torch.randn(37, width), torch.randn(37, 9)
    scores = torch.where(selection.valid, scores, 0)
    gates = torch.rand(37, 3) + 0.5
    at = [RowsAt(table, selection.active) for table in (values, keys)]
    wide = [RowsAt(table.double()[selection.active], None) for table in (values, keys)]

    dots = native_sparse.score_picks(x, at[1], selection)
    exact = (x.double()[:, None] * wide[1].table[selection.picks]).sum(-1)
    assert near(dots, torch.where(selection.valid, exact, 0), width)

    weights = torch.where(selection.valid, torch.randn(37, 9), torch.nan)  # where there is no pick nothing is read
    bag = (weights.nan_to_num().double()[:, :, None] * wide[0].table[selection.picks]).sum(1)
    assert near(native_sparse.combine_rows(weights, at[0], selection), bag, 9)

    found = native_sparse.gradients(grad_y, Inputs(x, None), scores, gates, *at, selection)
    leaves = [t.double().requires_grad_() for t in (x, gates, wide[0].table, wide[1].table)]
    in_double = way_forward(*leaves, selection, scores.double())
    (in_double * grad_y.double()).sum().backward()
    for norms, rows in zip(found.squared_norms, (found.values, found.keys), strict=True):
        assert torch.allclose(norms, rows.double().square().sum(1), rtol=1e-12)
    for ours, leaf in zip(found[:4], leaves, strict=True):
        assert near(ours, leaf.grad, 9 * max(width, 37))


def way_forward(x: Tensor, gates: Tensor, values: Tensor, keys: Tensor, selection: Selection, scores: Tensor) -> Tensor:
    """The output, whose scores are those given but depend on x and keys; by autograd's own rules."""
    depend = (x[:, None] * keys[selection.picks]).sum(-1)
    raw = depend - depend.detach() + scores
    z = torch.where(selection.valid, raw * gates.gather(1, selection.slots), 0)
    return (z[:, :, None] * values[selection.picks]).sum(1)


def way_back(grad_y: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """All that it gives."""
    found = native_sparse.gradients(grad_y, Inputs(x, None), *arguments)
    return [*found[:4], *found.squared_norms]


def test_arguments_that_are_not_contiguous():
    """Which are copied, and the copies have to last as long as they are read."""
    selection, keys, values = drawn(40, 20, 4, 64, torch.float32)
    x, scores, gates = torch.randn(64, 40).T, torch.rand(4, 40).T, torch.rand(3, 40).T
    at = [RowsAt(table, selection.active) for table in (values, keys)]
    for found, expected in (
        (native_sparse.route(gates, 2), native_sparse.route(gates.contiguous(), 2)),
        (
            native_sparse.combine_rows(scores, at[0], selection),
            native_sparse.combine_rows(scores.contiguous(), at[0], selection),
        ),
        (native_sparse.score_picks(x, at[1], selection), native_sparse.score_picks(x.contiguous(), at[1], selection)),
        *zip(
            way_back(x, x, scores, gates, *at, selection),
            way_back(*(t.contiguous() for t in (x, x, scores, gates)), *at, selection),
            strict=True,
        ),
    ):
        assert torch.equal(found, expected)


def test_a_copy_of_the_values_beside_keys_in_place():
    """As after an idle time, when values are brought to date and keys are not."""
    selection, keys, values = drawn(11, 20, 4, 33, torch.bfloat16)
    x, grad_y = torch.randn(11, 33), torch.randn(11, 33)
    scores, gates = torch.where(selection.valid, torch.rand(11, 4), 0), torch.rand(11, 3)
    key_rows = RowsAt(keys, selection.active)
    copies = RowsAt(values[selection.active].float(), None)
    found = way_back(grad_y, x, scores, gates, copies, key_rows, selection)
    in_place = way_back(grad_y, x, scores, gates, RowsAt(values, selection.active), key_rows, selection)
    assert all(torch.equal(one, other) for one, other in zip(found, in_place, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    selection, keys, values = drawn(150, 60, 9, 129, torch.bfloat16)
    x, grad_y, scores = torch.randn(150, 129), torch.randn(150, 129), torch.rand(150, 9)
    gates, experts = torch.rand(150, 3), torch.stack([torch.randperm(4)[:2].sort().values for _ in range(150)])
    at = [RowsAt(table, selection.active) for table in (values, keys)]

    def everything(threads: int) -> list[Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return [
            native_sparse.score_experts(x, keys, experts, 4),
            native_sparse.combine_rows(scores, at[0], selection),
            native_sparse.score_picks(x, at[1], selection),
            *way_back(grad_y, x, scores, gates, *at, selection),
        ]

    one = everything(1)
    for threads in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(everything(threads), one, strict=True))


@pytest.mark.parametrize("top_k", [1, 5, 64, 80])
def test_selections_of_many_candidates(top_k):
    """Scores of few distinct values, so that ties are everywhere, with NaN and infinity among them."""
    tokens, per_token, size, experts = 40, 2, 33, 5
    chosen = torch.stack([torch.randperm(experts)[:per_token].sort().values for _ in range(tokens)])
    scores = torch.randint(-3, 9, (tokens, per_token, size)).float()
    scores[torch.rand(scores.shape) < 0.05] = torch.nan
    scores[torch.rand(scores.shape) < 0.02] = torch.inf
    gates = torch.tensor([1.0, 2.0]).repeat(tokens, 1)
    gates[(chosen == 2) & (torch.arange(tokens) % 7 == 0)[:, None]] = torch.nan
    arguments = {"rows": experts * size, "top_k": top_k}
    for cap in (None, 30):
        found, raw, overflow = native_sparse.select(chosen, gates, scores, cap=cap, **arguments)
        expected, expected_raw, expected_overflow = sparse.select(chosen, gates, scores, cap=cap, **arguments)
        assert torch.equal(found.active, expected.active) and torch.equal(found.experts, expected.experts)
        assert picked(found, raw) == picked(expected, expected_raw)
        assert overflow.wanted_rows == expected_overflow.wanted_rows
        assert torch.equal(overflow.mass.isinf(), expected_overflow.mass.isinf())


def picked(selection: Selection, raw: Tensor) -> list[list[tuple[int, int, float]]]:
    """Row, slot and score of each token's picks, wherever they stand in their line."""
    rows = selection.active[selection.picks]
    return [
        [(int(rows[t, k]), int(selection.slots[t, k]), float(raw[t, k])) for k in line.nonzero().flatten().tolist()]
        for t, line in enumerate(selection.valid)
    ]
