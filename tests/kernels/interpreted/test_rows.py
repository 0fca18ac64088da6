"""Lists of rows: who picked them, which stay under a cap, sums into slots and back to the host."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from meft_kernels.triton.cap import keep_largest
from meft_kernels.triton.combine import combine
from meft_kernels.triton.compact import compact
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.return_gradients import return_gradients
from meft_kernels.triton.row_gradients import row_gradients
from meft_kernels.triton.select_largest import among_largest, kth_largest
from tests.kernels.interpreted.cases import DEVICE, moved, on_host, synchronize


def drawn_ids(tokens: int, top_k: int, rows: int, share: float, seed: int = 0) -> torch.Tensor:
    """[T, K] int32: distinct rows of each token, ascending, then ``rows`` where there is none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((tokens, top_k), rows, dtype=torch.int32)
    for token in range(tokens):
        count = int((torch.rand(top_k, generator=generator) < share).sum())
        ids[token, :count] = torch.randperm(rows, generator=generator)[:count].sort().values.int()
    return ids


@pytest.mark.parametrize(
    ("tokens", "top_k", "rows", "share"),
    [(40, 6, 50, 0.7), (1, 1, 1, 1.0), (5, 4, 9, 0.0), (700, 4, 12, 1.0), (300, 8, 1 << 20, 0.9), (0, 3, 5, 1.0)],
)
def test_compact(tokens, top_k, rows, share):
    ids = drawn_ids(tokens, top_k, rows, share)
    found = moved(compact(moved(ids), rows), "cpu")
    valid = ids < rows
    active, positions = ids[valid].unique(return_inverse=True)
    count = int(found.count)
    assert torch.equal(found.rows[:count], active)
    assert torch.equal(found.valid, valid)
    assert torch.equal(found.positions[valid], positions)
    assert not found.positions[~valid].any()
    flat = ids.flatten()
    for row, start, end in zip(active, found.starts, found.ends, strict=False):
        assert torch.equal(found.order[start:end], (flat == row).nonzero().flatten().int())


def test_a_cap_keeps_the_largest_masses():
    ids = drawn_ids(60, 5, 40, 0.8)
    active = compact(moved(ids), 40)
    # Quarters, so that sums are exact and many are equal.
    activations = torch.where(ids < 40, torch.randint(1, 4, ids.shape) * 0.25, 0.0)
    activations[3, 0] = torch.inf
    mass = torch.zeros(41).index_add_(0, ids.flatten().long(), activations.flatten())[:40]
    for cap in (1, 2, 13, 39, 40, 1000):
        kept = moved(keep_largest(active, moved(activations), cap), "cpu")
        expected = mass.sort(descending=True, stable=True).indices[: min(cap, int((mass > 0).sum()))].sort().values
        count = int(kept.count)
        assert torch.equal(kept.rows[:count].long(), expected)
        stays = torch.isin(ids.long(), expected)
        assert torch.equal(kept.valid, stays)
        assert torch.equal(kept.rows[kept.positions[stays]], ids[stays])
        assert not kept.positions[~stays].any()
        for row, start, end in zip(kept.rows[:count], kept.starts, kept.ends, strict=False):
            assert torch.equal(kept.order[start:end], (ids.flatten() == row).nonzero().flatten().int())


@triton.jit(do_not_specialize=["count", "wanted"])  # a 1 would be compiled in, and could not be carried by the loop
def _chosen(PRIORITIES, CHOSEN, FOUND, count, wanted, BLOCK: tl.constexpr):
    threshold, ties = kth_largest(PRIORITIES, count, wanted, BLOCK)
    before = count * 0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        priority = tl.load(PRIORITIES + at, mask=at < count, other=0)
        chosen, before = among_largest(priority, threshold, ties, before)
        tl.store(CHOSEN + at, chosen, mask=at < count)
    tl.store(FOUND, threshold)


@pytest.mark.parametrize("most", [3, 1000, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 16, 45])
def test_the_largest_are_exact(count, most):
    generator = torch.Generator().manual_seed(count)
    priorities = torch.randint(0, most + 1, (count,), generator=generator).clamp(max=most).int()
    priorities[count // 2] = most
    chosen, found = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (count, 1))
    most_wanted = int((priorities > 0).sum())
    for wanted in {0, 1, most_wanted // 2, most_wanted - 1, most_wanted}:
        _chosen[(1,)](moved(priorities), chosen, found, count, wanted, BLOCK=16)
        expected = priorities.sort(descending=True, stable=True).indices[:wanted].sort().values
        assert torch.equal(chosen.cpu().nonzero().flatten(), expected)


def test_expert_lists_are_complete_and_in_order():
    experts = torch.stack([torch.randperm(11)[:3].sort().values for _ in range(50)])
    experts[experts == 4] = 5  # nobody's
    counts = torch.bincount(experts.flatten(), minlength=11).int()
    found = expert_lists(moved(experts), moved(counts))
    assert torch.equal(found.cpu().long(), experts.flatten().argsort(stable=True))


@pytest.mark.parametrize("width", [1, 16, 45, 1100])
def test_sums_go_to_slots_and_are_added(width):
    ids = drawn_ids(30, 4, 25, 0.8)
    on_device = compact(moved(ids), 25)
    active = moved(on_device, "cpu")
    count, most = int(active.count), active.rows.shape[0]
    grad_y, h, center = torch.randn(30, width), torch.randn(30, width), torch.randn(width)
    activations, grad_scores = torch.rand(30, 4), torch.randn(30, 4)
    slots = torch.randperm(40)[:most].int()
    slots[1] = -1
    fresh = torch.randint(0, 2, (most,), dtype=torch.int32)
    # What stands before the slots belongs to somebody else.
    whole = [torch.randn(41, width) for _ in range(2)]
    before = [table[0].clone() for table in whole]
    values, keys = (table[1:] for table in whole)
    expected = [values.double(), keys.double()]
    for table, weights, x in zip(expected, (activations, grad_scores), (grad_y, h - center), strict=True):
        for position in range(count):
            if (slot := int(slots[position])) >= 0:
                picks = (ids == active.rows[position]).nonzero()
                total = sum(weights[t, k].double() * x[t].double() for t, k in picks)
                table[slot] = total + (0 if fresh[position] else table[slot])
    whole = [moved(table) for table in whole]
    found = [table[1:] for table in whole]
    given = [moved(t) for t in (grad_y, h, activations, grad_scores)]
    row_gradients(*given, on_device, *found, moved(slots), moved(fresh), center=moved(center))
    for table, right in zip(found, expected, strict=True):
        torch.testing.assert_close(table.cpu().double(), right, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(table[0].cpu(), row) for table, row in zip(whole, before, strict=True))


def test_what_is_not_fresh_may_be_anything():
    """A slot that holds nothing yet is not read, whatever it contains."""
    active = compact(torch.tensor([[0], [1]], dtype=torch.int32, device=DEVICE), 2)
    values, keys = (torch.full((2, 3), torch.nan, device=DEVICE) for _ in range(2))
    one, row = torch.ones(2, 1, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    row_gradients(row, row, one, one, active, values, keys, slots, torch.ones_like(slots))
    assert torch.equal(values, row) and torch.equal(keys, row)


@pytest.mark.parametrize("width", [1, 33, 2500])
@pytest.mark.parametrize("count", [0, 1, 11])
def test_gradients_return_to_the_host(width, count):
    gradients, total = torch.randn(16, width), on_host(torch.randn(50, width))
    slots, rows = torch.randperm(16)[:12].int(), torch.randperm(50)[:12].int()
    fresh = torch.randint(0, 2, (12,), dtype=torch.int32)
    slots[4] = -1
    total[rows[:count][fresh[:count] > 0].long()] = torch.nan
    expected = total.clone()
    for slot, row, new in list(zip(slots.tolist(), rows.tolist(), fresh.tolist(), strict=True))[:count]:
        if slot >= 0:
            expected[row] = gradients[slot] if new else expected[row] + gradients[slot]
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    return_gradients(moved(gradients), total, moved(slots), moved(rows), moved(fresh), number, programs=3)
    synchronize()
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combined_rows_are_added_to_what_is_there(dtype):
    weights, picks = torch.randn(9, 3), torch.randint(0, 6, (9, 3))
    valid, places = torch.rand(9, 3) < 0.7, torch.randperm(20)[:6]
    weights[~valid] = torch.nan
    table, onto = torch.randn(20, 37), torch.randn(9, 37).to(dtype)
    table[~torch.isin(torch.arange(20), places)] = torch.nan
    expected = onto.double() + (
        torch.where(valid, weights, 0).double()[:, :, None] * table[places[picks]].double()
    ).sum(1)
    given = [moved(t) for t in (weights, picks, valid)]
    found = combine(*given, moved(table), places=moved(places), onto=moved(onto), dtype=dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.cpu().double(),
        expected,
        **({"rtol": 8e-3, "atol": 8e-3} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}),
    )
    scales = torch.rand(20)
    narrow = torch.randint(-127, 128, (20, 37)).to(torch.int8)
    found = combine(*given, moved(narrow), places=moved(places), scales=moved(scales))
    wide = narrow.double() * scales.double()[:, None]
    expected = (torch.where(valid, weights, 0).double()[:, :, None] * wide[places[picks]]).sum(1)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)
