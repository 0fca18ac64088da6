"""Rows in device slots: which are there, which are given away, whose they are, and how long they stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meft_engine.config import OffloadConfig
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from meft_kernels.slots import Gathered, OwnedRows, Residency, gather
from tests.late_copies import LateCopies
from tests.slot_cache import Cache

ROWS, WIDTH = 40, 5
ROW_BYTES = WIDTH * 4


@pytest.mark.parametrize("owns", [False, True])
@pytest.mark.parametrize("slots", [1, 24, 48, 200])
def test_against_a_model(slots, owns):
    """Fewer slots than rows that are asked for, rows that have changed, none at all, and rows that the device owns."""
    generator = torch.Generator().manual_seed(slots)
    rows, most = 150, 32
    table, into = torch.randn(rows, WIDTH), torch.full((slots, WIDTH), torch.nan)
    residency, cache, device, owned = Residency.empty(rows, slots, "cpu"), Cache(slots), table.clone(), None
    if owns:
        ids, place_of_row = torch.arange(0, rows, 7), torch.full((rows,), -1, dtype=torch.int32)
        place_of_row[ids] = torch.arange(len(ids)).flip(0).int()
        owned, cache.owned = OwnedRows(table[ids].flip(0), place_of_row), frozenset(ids.tolist())
        table[ids] = torch.nan
    for step in range(30):
        count = [most, 0, 1][step] if step < 3 else int(torch.randint(0, most + 1, (), generator=generator))
        near = torch.randperm(60 if step % 3 else rows, generator=generator)[:count].sort().values
        asked = torch.cat((near, torch.full((most - count,), -7)))
        changed = torch.randperm(rows, generator=generator)[:10]
        table[changed] += 1
        device[changed] += 1
        if owns:
            owned.table.copy_(device[ids].flip(0))
        residency.version_of_row[changed] += 1
        before, found = into.clone(), Gathered.room(most, "cpu")
        gather(table, into, asked, torch.tensor([count], dtype=torch.int32), residency, found, owned)
        expected = cache.ask(near.tolist(), residency.version_of_row.tolist())
        assert (found.slots[:count].tolist(), found.copied[:count].tolist(), found.counts.tolist()) == expected
        placed = found.slots[:count] >= 0
        assert torch.equal(into[found.slots[:count][placed].long()], device[near[placed]])
        untouched = torch.ones(slots, dtype=torch.bool)
        untouched[found.slots[:count][found.copied[:count] > 0].long()] = False
        assert torch.equal(into[untouched].nan_to_num(), before[untouched].nan_to_num())
        assert {row: slot for row, slot in enumerate(residency.slot_of_row.tolist()) if slot >= 0} == cache.slot_of


class Tables:
    """Value tables of several layers over one device."""

    def __init__(self, layers: int, *, slot_bytes: int | None, in_place: bool = True, early: bool = False) -> None:
        self.copies = LateCopies(in_place=in_place, early=early)
        self.traffic = Traffic.by(self.copies, OffloadConfig(slot_bytes=slot_bytes))
        self.tables = [
            PartiallyOffloadedTensor(
                f"{layer}/values",
                ROWS,
                WIDTH,
                device=torch.device("cpu"),
                compute_dtype=torch.float32,
                resident=False,
                traffic=self.traffic,
            )
            for layer in range(layers)
        ]
        for table in self.tables:
            table.fill(torch.randn(ROWS, WIDTH))

    def ask(self, layer: int, rows: Tensor, **settings: bool) -> Tensor:
        """The rows as they arrive; as many of ``rows`` as are not negative."""
        count = (rows >= 0).sum().int()[None]
        with self.tables[layer].rows_at(rows, count=count, latest=False, **settings) as at:
            return at.table[at.places[: int(count)].long()]

    def forward(self, layer: int, rows: Tensor) -> None:
        """Routing says which rows it will be, and then they are asked for."""
        self.tables[layer].expect(rows, (rows >= 0).sum().int()[None], latest=False, keep=True)
        assert torch.equal(self.ask(layer, rows, keep=True), self.tables[layer].master[rows[rows >= 0]])

    def backward(self, layer: int, rows: Tensor) -> None:
        """Asks again."""
        found = self.ask(layer, rows, keep=True, backward=True)
        assert torch.equal(found, self.tables[layer].master[rows[rows >= 0]])

    def visits(self, layer: int) -> tuple[int, int]:
        """Rows that were there, and rows that were brought."""
        return self.tables[layer]._on_device.visits()


def drawn(seed: int, count: int, room: int = 20) -> Tensor:
    """[room] rows, of which ``count`` are meant."""
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.cat((rows, torch.full((room - count,), -1)))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "staged"])
def test_rows_stay_for_the_backward_and_for_further_micro_steps(in_place):
    """Only new rows are brought, until an update changes some of them."""
    here = Tables(2, slot_bytes=None, in_place=in_place)
    first, second = drawn(0, 12), drawn(1, 15)
    for rows in (first, second):
        for layer in (0, 1):
            here.forward(layer, rows)
        for layer in (1, 0):
            here.backward(layer, rows)
    both = len(set(first[first >= 0].tolist()) & set(second[second >= 0].tolist()))
    assert here.visits(0) == here.visits(1)
    # 20 slots: a row of the first micro-step may have been given up for one of the second.
    there, brought = here.visits(0)
    assert there + brought == 12 + 15 and brought >= 12 + 15 - both
    assert here.tables[0].bytes_to_device == brought * ROW_BYTES
    assert here.traffic.slots.slots() == {"own": 2 * 20, "shared": 0}

    table, changed = here.tables[0], second[:3]
    table.write(changed, torch.ones(3, WIDTH))
    here.forward(0, second)
    assert here.visits(0) == (there + 12, brought + 3), "those that an update has changed, and no others"


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "staged"])
def test_layers_without_slots_of_their_own_bring_their_rows_twice(in_place):
    """One layer can afford its own; the others share, and the last forward's rows are still there."""
    here = Tables(4, slot_bytes=25 * ROW_BYTES, in_place=in_place)
    rows = [drawn(layer, 10) for layer in range(4)]
    for layer in range(4):
        here.forward(layer, rows[layer])
    begun = here.copies.begun
    for layer in reversed(range(4)):
        here.backward(layer, rows[layer])
    brought = [here.visits(layer)[1] for layer in range(4)]
    assert brought == [10, 20, 10, 10], "layers 2 and 3 were the last of the forward"
    assert here.traffic.slots.slots() == {"own": 20, "shared": 2 * 20}
    assert here.copies.begun == begun + 1


def test_a_backward_brings_the_rows_of_the_layer_before():
    here = Tables(5, slot_bytes=0)
    rows = [drawn(layer, 10) for layer in range(5)]
    for layer in range(5):
        here.forward(layer, rows[layer])
    for layer in reversed(range(5)):
        here.backward(layer, rows[layer])
        before = here.tables[layer - 1]._on_device if layer else None
        if layer:
            assert before._at is not None and before._at.visit.is_of(rows[layer - 1], before._asked[2])
    assert [here.visits(layer)[1] for layer in range(5)] == [20, 20, 20, 10, 10]


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "staged"])
def test_slots_that_are_in_use_are_not_lent(in_place, early):
    """While a backward reads its rows, those of the layer before come into the other set."""
    here = Tables(6, slot_bytes=0, in_place=in_place, early=early)
    rows = [drawn(layer, 10) for layer in range(6)]
    for layer in range(6):
        here.forward(layer, rows[layer])
    for layer in reversed(range(6)):
        table, count = here.tables[layer], torch.tensor([10], dtype=torch.int32)
        with table.rows_at(rows[layer], count=count, latest=False, keep=True, backward=True) as at:
            found = at.table[at.places[:10].long()]
        assert torch.equal(found, table.master[rows[layer][:10]])


def test_evaluation_takes_no_slots_from_training():
    """More tokens than a micro-step has: two sets for all layers."""
    here = Tables(3, slot_bytes=None)
    for layer in range(3):
        here.forward(layer, drawn(layer, 10))
    for layer in range(3):
        rows = drawn(7, 39, room=40)
        assert torch.equal(here.ask(layer, rows), here.tables[layer].master[rows[:39]])
    assert here.traffic.slots.slots() == {"own": 3 * 20, "shared": 2 * 40}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "staged"])
@pytest.mark.parametrize("slot_bytes", [None, 0], ids=["own slots", "shared slots"])
def test_rows_that_were_expected_and_not_asked_for(slot_bytes, in_place):
    """A guess that was wrong, or a forward that failed: what comes next is there all the same."""
    here = Tables(3, slot_bytes=slot_bytes, in_place=in_place)
    first, second = drawn(0, 12), drawn(1, 15)
    for layer in range(3):
        here.tables[layer].expect(first, torch.tensor([12], dtype=torch.int32), latest=False, keep=True)
    for layer in (2, 0, 1, 0):
        here.forward(layer, first)
    here.tables[1].expect(second, torch.tensor([15], dtype=torch.int32), latest=False, keep=True)
    here.forward(1, first)
    here.forward(1, second)


def test_an_update_waits_for_what_the_device_still_reads():
    """Rows that were expected arrive as they were, though the table changes before they are asked for."""
    here = Tables(1, slot_bytes=None)
    table, rows = here.tables[0], drawn(0, 10)
    before, (high, _) = table.master[rows[:10]], table.planes()
    version = table.version
    table.expect(rows, torch.tensor([10], dtype=torch.int32), latest=False, keep=True)
    table.expect_update(None)
    with table.writing():
        high.fill_(7.0)
        table.refresh(rows[:10])
    held = table._on_device._at
    assert held.visit.is_of(rows, version)
    assert torch.equal(held.buffer[held.visit.found.slots[:10].long()], before)
    here.forward(0, rows)


@pytest.mark.parametrize("slot_bytes", [None, 0], ids=["own slots", "shared slots"])
def test_slots_that_were_first_used_in_inference_mode(slot_bytes):
    here = Tables(3, slot_bytes=slot_bytes)
    for layer in range(3):
        with torch.inference_mode():
            here.forward(layer, drawn(layer, 10))
    here.tables[0].write(torch.arange(5), torch.ones(5, WIDTH))
    for layer in range(3):
        here.forward(layer, drawn(layer + 1, 10))


def test_closed_tables_give_their_slots_back():
    here = Tables(3, slot_bytes=20 * ROW_BYTES)
    for layer in range(3):
        here.forward(layer, drawn(layer, 10))
    for table in here.tables:
        table.close()
    assert here.traffic.slots.slots() == {"own": 0, "shared": 0} and here.traffic.slots.bytes() == 0
