"""Row gradients that come from the device beside the backward: all of them, in their order, and once they are there."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from meft_engine.config import OffloadConfig
from meft_engine.offload.returning import MOST_UNDER_WAY, GradientReturn
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from tests.late_copies import LateCopies

ROWS, WIDTH = 40, 7


def table(copies: LateCopies | None = None) -> PartiallyOffloadedTensor:
    return PartiallyOffloadedTensor(
        "keys",
        ROWS,
        WIDTH,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        resident=True,
        traffic=Traffic.by(copies, OffloadConfig()) if copies else None,
    )


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=generator)[: 5 + seed % 9].sort().values
    return rows, torch.randn(rows.numel(), WIDTH, generator=generator)


def test_what_arrives_is_what_was_sent():
    """Bit for bit that of gradients that are waited for, over more micro-steps than may be on their way."""
    late, plain = table(LateCopies()), table()
    for window in range(3):
        for micro_step in range(3 * MOST_UNDER_WAY):
            rows, grad = drawn(100 * window + micro_step)
            late.accumulate(rows, grad.clone())
            plain.accumulate(rows, grad)
        found, expected = late.gradient(), plain.gradient()
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.grad, expected.grad)
        assert late.squared_gradient_norm() == plain.squared_gradient_norm()
        late.clear_gradient()
        plain.clear_gradient()
        assert late.gradient() is None


def test_norms_arrive_too():
    one = table(LateCopies())
    rows, grad = drawn(0)
    one.accumulate(rows, grad, torch.full((rows.numel(),), 2.0, dtype=torch.float64))
    assert one.squared_gradient_norm() == 2.0 * rows.numel()


def test_a_gradient_that_is_on_its_way_is_not_put_behind_a_clear_or_a_replacement():
    one = table(LateCopies())
    one.accumulate(*drawn(1))
    one.clear_gradient()
    assert one.gradient() is None
    one.accumulate(*drawn(1))
    rows, grad = drawn(2)
    one.replace_gradient(rows, grad)
    assert torch.equal(one.gradient().rows, rows) and torch.equal(one.gradient().grad, grad)


def test_what_goes_wrong_is_raised_where_the_gradient_is_asked_for():
    one = table(LateCopies())
    one.accumulate(torch.tensor([ROWS]), torch.ones(1, WIDTH))
    with pytest.raises(IndexError, match="keys has 40 rows; a gradient names rows 40 to 40"):
        one.gradient()


def test_few_are_on_their_way_at_a_time():
    """Each of them holds memory on the device."""
    copies, gate, most = LateCopies(), threading.Event(), 0
    returns = GradientReturn(copies)
    room = torch.empty

    def add(rows: Tensor, grad: Tensor, norms: None) -> None:
        gate.wait(10)

    def send_all() -> None:
        for seed in range(3 * MOST_UNDER_WAY):
            returns.send(*drawn(seed), None, None, room, add)

    sender = threading.Thread(target=send_all)
    sender.start()
    sender.join(timeout=0.5)
    most = copies.begun // 2
    gate.set()
    sender.join()
    returns.drain()
    assert most == MOST_UNDER_WAY and copies.begun == copies.ended == 6 * MOST_UNDER_WAY
