"""Rows in device slots: which are there, which are given away, what is copied; against a plain model of it."""

from __future__ import annotations

import pytest
import torch

from meft_kernels.slots import OwnedRows, Residency
from meft_kernels.triton.gather import gather
from tests.kernels.interpreted.cases import DEVICE, moved, on_host
from tests.slot_cache import Cache


@pytest.mark.parametrize("owns", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("slots", [1, 24, 48, 200])
@pytest.mark.parametrize(("width", "dtype"), [(40, torch.float32), (17, torch.bfloat16), (5000, torch.float32)])
def test_against_a_model(slots, width, dtype, fused, owns):
    """Fewer slots than rows that are asked for, too, and rows that the device owns, of which the host has nothing."""
    generator = torch.Generator().manual_seed(slots)
    rows, most = 150, 32
    table = on_host(torch.randn(rows, width, generator=generator).to(dtype))
    into = torch.full((slots, width), torch.nan, dtype=dtype, device=DEVICE)
    device, owned = table.clone(), None
    residency, cache = Residency.empty(rows, slots, DEVICE), Cache(slots)
    if owns:
        ids, place_of_row = torch.arange(0, rows, 7), torch.full((rows,), -1, dtype=torch.int32)
        place_of_row[ids] = torch.arange(len(ids)).flip(0).int()
        owned, cache.owned = OwnedRows(moved(table[ids].flip(0)), moved(place_of_row)), frozenset(ids.tolist())
        table[ids] = torch.nan
    hits = 0
    for step in range(12 if width < 5000 else 4):
        count = [most, 0, 1][step] if step < 3 else int(torch.randint(0, most + 1, (), generator=generator))
        near = torch.randperm(60 if step % 3 else rows, generator=generator)[:count].sort().values
        asked = torch.full((most,), -7, dtype=torch.int32)
        asked[:count] = near.int()
        changed = torch.randperm(rows, generator=generator)[:10]
        table[changed] += 1
        device[changed] += 1
        if owns:
            owned.table.copy_(device[ids].flip(0))
        residency.version_of_row[moved(changed)] += 1
        before = into.cpu().clone()
        number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
        found = moved(gather(table, into, moved(asked), number, residency, owned=owned, programs=3, fused=fused), "cpu")
        expected = cache.ask(near.tolist(), residency.version_of_row.tolist())
        assert (found.slots[:count].tolist(), found.copied[:count].tolist(), found.counts.tolist()) == expected
        placed, after = found.slots[:count] >= 0, into.cpu()
        assert torch.equal(after[found.slots[:count][placed].long()], device[near[placed]])
        untouched = torch.ones(slots, dtype=torch.bool)
        untouched[found.slots[:count][found.copied[:count] > 0].long()] = False
        assert torch.equal(after[untouched].nan_to_num(), before[untouched].nan_to_num())
        assert {row: slot for row, slot in enumerate(residency.slot_of_row.tolist()) if slot >= 0} == cache.slot_of
        hits += int(found.counts[0])
    assert slots == 1 or hits
