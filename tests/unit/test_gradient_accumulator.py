"""`GradientAccumulator`: the sum of a window's row gradients, bit for bit that of a dense one in the same order."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from meft_engine.offload import gradients
from meft_engine.offload.gradients import GradientAccumulator

ROWS, WIDTH = 61, 19


@pytest.fixture(autouse=True)
def passes(each_passes, monkeypatch) -> ModuleType:
    monkeypatch.setattr(gradients, "row_passes", lambda: each_passes)
    return each_passes


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


class Dense:
    """One float32 sum a row, in the order of the calls, and the order of first appearance."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, rows: Tensor, grad: Tensor) -> None:
        for row, g in zip(rows.tolist(), grad, strict=True):
            self.sums[row] = self.sums[row] + g if row in self.sums else g.clone()

    def check(self, accumulator: GradientAccumulator) -> None:
        found = accumulator.sum()
        assert found.rows.tolist() == list(self.sums) and found.grad.shape == (len(self.sums), WIDTH)
        assert torch.equal(bits(found.grad), bits(torch.stack(list(self.sums.values()))))
        assert found.grad.is_contiguous() and found.rows.is_contiguous()


def some_gradient(count: int) -> tuple[Tensor, Tensor]:
    """Of distinct rows in no order, over many magnitudes, so that another order of summation would show."""
    grad = torch.randn(count, WIDTH) * 10.0 ** torch.randint(-4, 5, (count, WIDTH))
    return torch.randperm(ROWS)[:count], grad


@pytest.mark.parametrize("threads", [1, 3])
def test_many_sums_in_order_over_many_windows(threads):
    """A window forgets all of the one before; every count of new rows occurs, none and all among them."""
    accumulator = GradientAccumulator(ROWS, threads)
    assert accumulator.sum() is None
    for _ in range(12):
        dense = Dense()
        for count in torch.randint(0, ROWS + 1, (9,)).tolist():
            rows, grad = some_gradient(count)
            dense.add(rows, grad)
            accumulator.add(rows.clone(), grad.clone())
            if dense.sums:
                dense.check(accumulator)
        accumulator.clear()
        assert accumulator.sum() is None


def test_negative_zero_and_nan_are_put_not_added():
    """0 + −0 is 0, so that a first gradient added to zeros would not stay what it is."""
    accumulator, dense = GradientAccumulator(ROWS, 1), Dense()
    for rows in ([3], [5, 3], [9], [9, 5]):
        grad = torch.full((len(rows), WIDTH), -0.0)
        grad[0, 0] = math.nan if rows == [9] else -0.0
        dense.add(torch.tensor(rows), grad)
        accumulator.add(torch.tensor(rows), grad.clone())
    found = accumulator.sum()
    assert found.rows.tolist() == [3, 5, 9] == list(dense.sums)
    assert found.grad.signbit()[:, 1:].all() and found.grad[:, 0].isnan().tolist() == [False, False, True]


def test_the_first_gradient_is_taken_over_and_later_ones_are_only_read():
    accumulator = GradientAccumulator(ROWS, 1)
    (rows, grad), (later_rows, later), same = some_gradient(20), some_gradient(31), torch.randn(20, WIDTH)
    kept = rows.clone(), later_rows.clone(), later.clone(), same.clone()
    expected = grad + same
    accumulator.add(rows, grad)
    assert accumulator.sum().grad.data_ptr() == grad.data_ptr() and accumulator.sum().rows.data_ptr() == rows.data_ptr()
    accumulator.add(rows, same)
    assert accumulator.sum().grad.data_ptr() == grad.data_ptr() and torch.equal(grad, expected)
    accumulator.add(later_rows, later)
    for now, before in zip((rows, later_rows, later, same), kept, strict=True):
        assert torch.equal(now, before)
    # Rows that the first gradient does not have need room of their own, and what it was is no longer written to.
    assert accumulator.sum().grad.data_ptr() != grad.data_ptr()
    accumulator.add(rows, same)
    assert torch.equal(grad, expected)


def test_the_buffer_grows_by_doubling_and_never_beyond_the_table():
    """One new row at a time: few allocations, none of more than the table's rows or twice those that there are."""
    accumulator, dense, places = GradientAccumulator(ROWS, 1), Dense(), []
    for row in torch.randperm(ROWS).tolist():
        rows, grad = torch.tensor([row]), torch.randn(1, WIDTH)
        dense.add(rows, grad)
        accumulator.add(rows, grad)
        places.append(accumulator.sum().grad.data_ptr())
        capacity = accumulator.sum().grad.untyped_storage().nbytes() // (WIDTH * 4)
        assert len(dense.sums) <= capacity <= min(ROWS, 2 * len(dense.sums))
    dense.check(accumulator)
    assert sum(a != b for a, b in zip(places, places[1:], strict=False)) <= math.ceil(math.log2(ROWS))


def test_a_cleared_accumulator_lets_go_of_what_it_was_given():
    accumulator = GradientAccumulator(ROWS, 1)
    for _ in range(2):
        rows, grad = some_gradient(7)
        accumulator.add(rows, grad)
    taken = accumulator.sum()
    kept = taken.grad.clone()
    accumulator.clear()
    accumulator.add(*some_gradient(7))
    accumulator.add(*some_gradient(9))
    # An update that still runs on another thread has the sum of the last window to itself.
    assert torch.equal(taken.grad, kept)
