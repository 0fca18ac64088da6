"""Rows are read as they were at one moment, whatever is done to them meanwhile."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from torch import Tensor

from meft_engine.checkpoint import snapshot as module
from meft_engine.checkpoint.snapshot import RowSnapshot, SnapshotMemory
from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam

WIDTH, ROWS = 5, 103
NO_END = 1 << 40


def make(
    dtype: torch.dtype, moments: torch.dtype = torch.float32, widths: tuple[int, int] = (WIDTH, WIDTH)
) -> tuple[list, SparseCPUAdam]:
    tables = []
    for name, width in zip(("keys", "values"), widths, strict=True):
        table = PartiallyOffloadedTensor(name, ROWS, width, device="cpu", compute_dtype=dtype, resident=False)
        table.fill(torch.randn(ROWS, width))
        tables.append(table)
    optimizer = SparseCPUAdam(tables, lr=0.1, weight_decay=0.1, moments_dtype=moments)
    step(tables, optimizer)
    return tables, optimizer


def step(tables: list, optimizer: SparseCPUAdam, share: float = 0.4) -> None:
    for table in tables:
        rows = (torch.rand(ROWS) < share).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))]
        table.accumulate(rows, torch.randn(len(rows), table.width))
    optimizer.step()
    optimizer.zero_grad()


def train(tables: list, optimizer: SparseCPUAdam) -> None:
    for _ in range(10):
        step(tables, optimizer)


def state(tables: list, optimizer: SparseCPUAdam) -> dict[str, Tensor]:
    return {
        f"{table.name}/{kind}": plane.clone()
        for table in tables
        for kind, plane in optimizer.saved_planes(table).items()
    }


class Reader:
    """Takes block by block, and puts tables together."""

    def __init__(self, snapshot: RowSnapshot) -> None:
        self.snapshot, self.blocks, self.found = snapshot, list(snapshot.blocks()), {}

    def take(self, count: int = 10**9) -> None:
        for block in self.blocks[:count]:
            for kind, rows in self.snapshot.take(block).items():
                self.found.setdefault(f"{block.table.name}/{kind}", []).append(rows.clone())
        del self.blocks[:count]

    def equals(self, expected: dict[str, Tensor]) -> bool:
        assert self.found.keys() == expected.keys()
        return all(torch.equal(torch.cat(parts), expected[name]) for name, parts in self.found.items())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(module, "pieces", lambda rows, row_bytes, _: pieces(rows, row_bytes, limit=11 * row_bytes))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_between_any_two_blocks_change_nothing_of_it(dtype, moments):
    tables, optimizer = make(dtype, moments)
    before = state(tables, optimizer)
    snapshot = RowSnapshot(optimizer, SnapshotMemory(optimizer, NO_END))
    reader = Reader(snapshot)
    draw = random.Random(3)
    while reader.blocks:
        step(tables, optimizer)
        reader.take(draw.randrange(3))
    assert reader.equals(before)
    assert not reader.equals(state(tables, optimizer)), "the steps must have changed rows"
    assert snapshot._memory.used == 0 and snapshot.most_copied > 0


def test_a_row_is_copied_once_and_not_after_it_was_read():
    tables, optimizer = make(torch.float32)
    snapshot = RowSnapshot(optimizer, SnapshotMemory(optimizer, NO_END))
    reader = Reader(snapshot)
    step(tables, optimizer, share=1.1)
    # Of each row: a master, two moments and a step.
    whole = 2 * ROWS * (3 * 4 * WIDTH + 4)
    assert snapshot.most_copied == whole
    step(tables, optimizer, share=1.1)
    assert snapshot.most_copied == whole
    reader.take()
    step(tables, optimizer, share=1.1)
    assert snapshot._memory.used == 0 and snapshot.most_copied == whole


def test_memory_of_copies_is_used_again():
    tables, optimizer = make(torch.float32)
    memory = SnapshotMemory(optimizer, NO_END)
    assert memory.nbytes == 2 * ROWS * (3 * 4 * WIDTH + 4), "never more than the rows take"
    snapshot = RowSnapshot(optimizer, memory)
    reader = Reader(snapshot)
    while reader.blocks:
        step(tables, optimizer, share=0.2)
        reader.take(1)
    (room,) = memory._rooms.values()
    places = room._free.unique()
    assert torch.equal(places, torch.arange(2 * ROWS)), "each place is free once"
    copies = room._copies["compute"]
    touched = (copies != 0).any(dim=1).sum() * room.row_bytes
    assert 0 < touched == snapshot.most_copied, "places that were used before come first"
    snapshot.close()

    given_up = RowSnapshot(optimizer, memory)
    step(tables, optimizer)
    assert memory.used > 0
    given_up.close()
    assert memory.used == 0
    before = state(tables, optimizer)
    reader = Reader(RowSnapshot(optimizer, memory))
    step(tables, optimizer)
    reader.take()
    assert reader.equals(before)


def test_rows_that_are_written_by_hand_are_kept_too():
    tables, optimizer = make(torch.bfloat16)
    before = state(tables, optimizer)
    reader = Reader(RowSnapshot(optimizer, SnapshotMemory(optimizer, NO_END)))
    tables[0].write(torch.tensor([0, 50, 102]), torch.ones(3, WIDTH))
    tables[1].fill(torch.zeros(ROWS, WIDTH))
    reader.take()
    assert reader.equals(before)


@pytest.mark.parametrize("budget", [1, 500, 3000])
def test_beyond_its_budget_an_update_waits_for_the_reader(budget):
    tables, optimizer = make(torch.float32)
    before = state(tables, optimizer)
    snapshot = RowSnapshot(optimizer, SnapshotMemory(optimizer, budget))
    reader = Reader(snapshot)
    updates = threading.Thread(daemon=True, target=lambda: [step(tables, optimizer, share=0.9) for _ in range(3)])
    updates.start()
    time.sleep(0.2)
    assert updates.is_alive(), "the update must wait"
    while reader.blocks:
        reader.take(1)
        time.sleep(0.002)
    updates.join(timeout=20)
    assert not updates.is_alive()
    assert reader.equals(before) and snapshot.most_copied <= budget


def test_waiting_gives_signs_of_life_and_ends_when_the_snapshot_is_given_up():
    tables, optimizer = make(torch.float32)
    snapshot = RowSnapshot(optimizer, SnapshotMemory(optimizer, 1))
    beats = []
    waiting = threading.Thread(target=lambda: tables[0].about_to_change(torch.tensor([7]), lambda: beats.append(1)))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and len(beats) > 2
    snapshot.close()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert all(table.before_change is None for table in tables)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (3, 7)])
@pytest.mark.parametrize("budget", [2000, NO_END])
def test_a_reader_and_updates_at_full_speed(budget, widths):
    """Many times, so that they meet in every way; tables of different widths share the budget, but no copies."""
    for _ in range(20):
        tables, optimizer = make(torch.bfloat16, widths=widths)
        before = state(tables, optimizer)
        snapshot = RowSnapshot(optimizer, SnapshotMemory(optimizer, budget))
        reader = Reader(snapshot)
        updates = threading.Thread(target=train, args=(tables, optimizer), daemon=True)
        updates.start()
        reader.take()
        updates.join(timeout=60)
        assert not updates.is_alive()
        assert snapshot._memory.used == 0 and snapshot.most_copied <= budget
        snapshot.close()
        assert reader.equals(before)


def test_without_a_budget_tables_know_nothing_of_it():
    tables, optimizer = make(torch.float32)
    reader = Reader(RowSnapshot(optimizer))
    assert all(table.before_change is None for table in tables)
    before = state(tables, optimizer)
    reader.take()
    assert reader.equals(before)
