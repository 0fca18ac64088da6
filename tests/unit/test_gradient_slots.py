"""Gradients that stay on the device until a window ends: where each goes, and that the sums are those of a host's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meft_engine.config import OffloadConfig
from meft_engine.offload.gradient_slots import GradientSlots
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from meft_kernels.sparse import PickGradients, placed
from tests.late_copies import LateCopies

ROWS, WIDTH, ROOM = 40, 3, 24


class Layer:
    """Keys and values on a device whose copies are late, or on the host where ``slots`` is ``None``."""

    def __init__(self, slots: int | None) -> None:
        traffic = Traffic.by(LateCopies(), OffloadConfig()) if slots is not None else None
        self.keys, self.values = (
            PartiallyOffloadedTensor(
                kind,
                ROWS,
                WIDTH,
                device=torch.device("cpu"),
                compute_dtype=torch.float32,
                resident=True,
                traffic=traffic,
            )
            for kind in ("keys", "values")
        )
        self.slots = GradientSlots(self.keys, self.values, slots) if slots else None

    def micro_step(self, rows: Tensor, grads: list[Tensor], *, padded: bool) -> None:
        """Hand over the gradients [n, d] of ``rows`` [n], or as those who do not tell the host how many there are."""
        count = torch.tensor([rows.numel()], dtype=torch.int32) if padded else None
        given = torch.cat((rows, torch.full((ROOM - rows.numel(),), -1))) if padded else rows
        if self.slots is not None:
            places = self.slots.places(given, count)
            found = placed(PickGradients(torch.empty(0), torch.empty(0), *grads), places)
            given, grads, count = places.rows, [found.values, found.keys], places.count
            junk = torch.full((ROOM - len(found.values), WIDTH), torch.nan)
            grads = [torch.cat((grad, junk))[: given.numel()] for grad in grads]
        elif padded:
            grads = [torch.cat((grad, torch.full((ROOM - len(grad), WIDTH), torch.nan))) for grad in grads]
        self.values.accumulate(given, grads[0].clone(), None, count)
        self.keys.accumulate(given, grads[1].clone(), None, count)

    def sums(self) -> list[Tensor]:
        """[r, d] of both tables, dense."""
        found = []
        for table in (self.values, self.keys):
            gradient = table.gradient()
            dense = torch.zeros(ROWS, WIDTH)
            if gradient is not None:
                assert gradient.rows.unique().numel() == gradient.rows.numel()
                dense[gradient.rows] = gradient.grad
            found.append(dense)
            table.clear_gradient()
        return found


def drawn(seed: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=generator)[: [0, 24, 1][seed] if seed < 3 else 5 + seed % 19].sort().values
    return rows, [torch.randn(rows.numel(), WIDTH, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("slots", [0, 1, 10, ROWS])
def test_sums_are_those_of_a_host_bit_for_bit(slots, padded):
    """Whether rows have a slot, lie on the host, or come when all slots are taken."""
    device, host = Layer(slots), Layer(None)
    for window in range(4):
        for micro_step in range(5):
            rows, grads = drawn(5 * window + micro_step)
            device.micro_step(rows, grads, padded=padded)
            host.micro_step(rows, grads, padded=False)
        assert all(map(torch.equal, device.sums(), host.sums()))


def test_only_what_has_no_slot_crosses_before_the_end():
    device = Layer(10)
    rows, grads = torch.arange(16), [torch.ones(16, WIDTH)] * 2
    for _ in range(3):
        device.micro_step(rows, grads, padded=True)
    device.keys.finish_sending()
    row_bytes = WIDTH * 4
    assert device.keys.bytes_to_host == device.values.bytes_to_host == 3 * 6 * row_bytes
    assert all(torch.equal(sums[:16], torch.full((16, WIDTH), 3.0)) for sums in device.sums())
    assert device.keys.bytes_to_host == (3 * 6 + 10) * row_bytes
    assert device.slots.device_bytes() == 2 * 10 * row_bytes


def test_a_layer_that_comes_again_after_it_was_flushed_waits_for_the_copies():
    device, host = Layer(30), Layer(None)
    for micro_step in range(3, 7):
        rows, grads = drawn(micro_step)
        device.micro_step(rows, grads, padded=True)
        device.slots.flush()
        host.micro_step(rows, grads, padded=False)
    assert all(map(torch.equal, device.sums(), host.sums()))


def test_slots_are_free_again_after_a_window():
    device = Layer(10)
    for start in (0, 10, 20):
        before = device.keys.bytes_to_host
        device.micro_step(torch.arange(start, start + 10), [torch.ones(10, WIDTH)] * 2, padded=True)
        device.keys.finish_sending()
        assert device.keys.bytes_to_host == before
        device.sums()
