"""The order of streams on a card: with a computation that is far behind, every copy takes what it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meft_engine.offload.copies import CudaCopies
from meft_engine.offload.memory import host_zeros

COUNT = 1 << 20


@pytest.fixture
def copies() -> CudaCopies:
    return CudaCopies(torch.device("cuda", torch.cuda.current_device()))


def lag() -> None:
    """Keep the computation busy for some tenths of a second."""
    torch.cuda._sleep(500_000_000)


def pinned(value: float) -> Tensor:
    return host_zeros((COUNT,), torch.float32, pin_memory=True).fill_(value)


@pytest.mark.parametrize("round_", range(3))
def test_to_the_host_after_what_the_device_was_told_before(copies, round_):
    """Though the source is given up at once, and its memory used for something else."""
    source, into = torch.zeros(COUNT, device="cuda"), pinned(0.0)
    lag()
    source.fill_(1.0)
    copy = copies.to_host(into, source)
    del source
    others = [torch.full((COUNT,), 2.0, device="cuda") for _ in range(4)]
    copy.wait()
    assert torch.equal(into, torch.ones(COUNT)) and len(others) == 4


def test_to_the_host_of_what_is_complete_waits_for_nothing_else(copies):
    source, into = torch.ones(COUNT, device="cuda"), pinned(0.0)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    lag()
    busy.record()
    copies.to_host(into, source, complete=True).wait()
    assert not busy.query() and torch.equal(into, torch.ones(COUNT))
    torch.cuda.synchronize()


def test_to_the_device_beside_the_computation(copies):
    """The host may write over the source once the copy has ended, however far behind the computation is."""
    source = pinned(1.0)
    busy = torch.cuda.Event()
    lag()
    busy.record()
    found, copy = copies.to_device(source)
    copy.wait()
    assert not busy.query()
    source.fill_(7.0)
    copy.hold_device()
    total = found.sum()
    del found
    others = [torch.full((COUNT,), 2.0, device="cuda") for _ in range(4)]
    assert total.item() == COUNT and len(others) == 4


def test_work_begins_after_what_was_told_before_and_ends_before_what_holds(copies):
    state, result = torch.zeros(COUNT, device="cuda"), torch.zeros(COUNT, device="cuda")
    lag()
    state.fill_(3.0)

    def work() -> None:
        torch.cuda._sleep(100_000_000)
        result.copy_(state)

    copy = copies.beside(work, [result])
    copy.hold_device()
    assert result.sum().item() == 3 * COUNT


def test_only_pinned_memory_is_read_in_place(copies):
    assert copies.read_in_place(pinned(0.0))
    assert not copies.read_in_place(torch.zeros(4))
