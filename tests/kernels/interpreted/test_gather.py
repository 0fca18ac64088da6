"""Rows in device slots: which are there, which are given away, what is copied; against a plain model of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from meft_kernels.triton.gather import Residency, gather
from tests.kernels.interpreted.cases import DEVICE, moved, on_host


@dataclass
class Cache:
    """A cache of S slots, by dictionaries."""

    slots: int
    slot_of: dict[int, int] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)
    version: dict[int, int] = field(default_factory=dict)
    now: int = 0

    def ask(self, rows: list[int], versions: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Slots of the rows, whether each is copied, and the four counts."""
        self.now += 1
        there = [row in self.slot_of for row in rows]
        stale = [known and self.version[row] != versions[row] for row, known in zip(rows, there, strict=True)]
        for row, known in zip(rows, there, strict=True):
            if known:
                self.used[self.slot_of[row]] = self.now
        held = {slot: row for row, slot in self.slot_of.items()}
        candidates = [slot for slot in range(self.slots) if slot not in held or self.used[slot] != self.now]
        candidates.sort(key=lambda slot: (slot in held, self.used.get(slot, 0), slot))
        missing = there.count(False)
        victims = sorted(candidates[:missing])
        for slot in victims:
            if slot in held:
                del self.slot_of[held[slot]]
        found, copied = [], []
        for row, known, old in zip(rows, there, stale, strict=True):
            if not known and victims:
                self.slot_of[row] = victims.pop(0)
                self.used[self.slot_of[row]] = self.now
                known, old = True, True
            found.append(self.slot_of[row] if known else -1)
            copied.append(int(old))
            self.version[row] = versions[row]
        unplaced = found.count(-1)
        return found, copied, [len(rows) - missing - sum(stale), missing, sum(stale), unplaced]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("slots", [1, 24, 48, 200])
@pytest.mark.parametrize(("width", "dtype"), [(40, torch.float32), (17, torch.bfloat16), (5000, torch.float32)])
def test_against_a_model(slots, width, dtype, fused):
    """Fewer slots than rows that are asked for, too."""
    generator = torch.Generator().manual_seed(slots)
    rows, most = 150, 32
    table = on_host(torch.randn(rows, width, generator=generator).to(dtype))
    into = torch.full((slots, width), torch.nan, dtype=dtype, device=DEVICE)
    residency, cache = Residency.empty(rows, slots, DEVICE), Cache(slots)
    hits = 0
    for step in range(12 if width < 5000 else 4):
        count = [most, 0, 1][step] if step < 3 else int(torch.randint(0, most + 1, (), generator=generator))
        near = torch.randperm(60 if step % 3 else rows, generator=generator)[:count].sort().values
        asked = torch.full((most,), -7, dtype=torch.int32)
        asked[:count] = near.int()
        changed = torch.randperm(rows, generator=generator)[:10]
        table[changed] += 1
        residency.version_of_row[moved(changed)] += 1
        before = into.cpu().clone()
        number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
        found = moved(gather(table, into, moved(asked), number, residency, programs=3, fused=fused), "cpu")
        expected = cache.ask(near.tolist(), residency.version_of_row.tolist())
        assert (found.slots[:count].tolist(), found.copied[:count].tolist(), found.counts.tolist()) == expected
        placed, after = found.slots[:count] >= 0, into.cpu()
        assert torch.equal(after[found.slots[:count][placed].long()], table[near[placed]])
        untouched = torch.ones(slots, dtype=torch.bool)
        untouched[found.slots[:count][found.copied[:count] > 0].long()] = False
        assert torch.equal(after[untouched].nan_to_num(), before[untouched].nan_to_num())
        assert {row: slot for row, slot in enumerate(residency.slot_of_row.tolist()) if slot >= 0} == cache.slot_of
        hits += int(found.counts[0])
    assert slots == 1 or hits
