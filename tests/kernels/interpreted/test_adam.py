"""AdamW over rows that a device owns: the bits of the host's."""

from __future__ import annotations

import pytest
import torch

from meft_kernels import rows as host
from meft_kernels.owned import BiasCorrections
from meft_kernels.owned import adam_rows as in_pytorch
from meft_kernels.planes import split
from meft_kernels.rows import AdamStep, RowTable
from meft_kernels.triton.adam import adam_rows
from tests.kernels.interpreted.cases import DEVICE, moved


def drawn_table(rows: int, width: int, planes: bool, moments: torch.dtype) -> RowTable:
    weights = torch.randn(rows, width)
    high, low = split(weights) if planes else (weights, None)
    if moments == torch.bfloat16:
        exp_avg, exp_avg_sq = host.paired_moments(torch.rand(rows, width, 2).mul(0.01).bfloat16())
    else:
        exp_avg, exp_avg_sq = torch.randn(rows, width) * 0.1, torch.rand(rows, width) * 0.01
    return RowTable(high, low, exp_avg, exp_avg_sq, torch.randint(0, 5, (rows,), dtype=torch.int32))


def copied(table: RowTable, device: torch.device | str) -> RowTable:
    fields = {name: None if plane is None else plane.clone().to(device) for name, plane in table._asdict().items()}
    if table.exp_avg.dtype == torch.bfloat16:
        pairs = torch.stack((table.exp_avg_sq, table.exp_avg), dim=-1).to(device)
        fields["exp_avg"], fields["exp_avg_sq"] = host.paired_moments(pairs)
    return RowTable(**fields)


def bits(plane: torch.Tensor) -> torch.Tensor:
    return plane.contiguous().view(torch.int32 if plane.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 57, 1030])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 5])
def test_bits(planes, moments, width, seed):
    expected = drawn_table(20, width, planes, moments)
    table = copied(expected, DEVICE)
    step = AdamStep(grad_scale=0.5, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, decay=1 - 1e-4, seed=seed)
    rows, slots = torch.randperm(20)[:9].int(), torch.randperm(15)[:9].int()
    gradients = torch.randn(15, width)
    gradients[slots[2]] = torch.inf
    gradients[slots[7], 0] = torch.nan
    count = torch.tensor([8], dtype=torch.int32)  # the last is not asked for
    given, corrections = [moved(t) for t in (rows, count, gradients, slots)], BiasCorrections().of(step, 10, DEVICE)
    for _ in range(3):
        infinite = host.adam_rows(expected, rows[:8].long(), gradients[slots[:8].long()], step)
        assert int(adam_rows(table, *given, step, corrections)) == infinite
        for name, ours in copied(table, "cpu")._asdict().items():
            theirs = getattr(expected, name)
            if ours is not None and ours.is_floating_point():
                # The payload of a NaN is nobody's business.
                assert torch.equal(ours.isnan(), theirs.isnan()), name
                ours, theirs = (torch.where(t.isnan(), 0, t) for t in (ours, theirs))
                assert torch.equal(bits(ours), bits(theirs)), name
            elif ours is not None:
                assert torch.equal(ours, theirs), name


def test_steps_are_the_rows_own():
    table = drawn_table(3, 4, True, torch.float32)
    step = AdamStep(grad_scale=1.0, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, decay=1.0, now=7)
    with pytest.raises(ValueError, match="step.now = 7"):
        one = torch.zeros(1, dtype=torch.int32)
        adam_rows(table, one, one + 1, torch.zeros(1, 4), one, step, BiasCorrections().of(step, 10, "cpu"))


@pytest.mark.parametrize("passes", [adam_rows, in_pytorch], ids=["triton", "pytorch"])
def test_rows_of_a_larger_table_draw_the_bits_that_they_draw_there(passes):
    whole = drawn_table(20, 24, True, torch.bfloat16)
    ids, places = torch.tensor([17, 3, 11, 0]), torch.tensor([2, 0, 3, 1])
    part = RowTable(
        whole.high[ids], whole.low[ids], *host.paired_moments(torch.empty(4, 24, 2).bfloat16()), whole.step[ids]
    )
    part.exp_avg.copy_(whole.exp_avg[ids])
    part.exp_avg_sq.copy_(whole.exp_avg_sq[ids])
    here = copied(part, DEVICE)
    step = AdamStep(grad_scale=1.0, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, decay=1.0, seed=5)
    gradients, three = torch.randn(4, 24), torch.tensor([3], dtype=torch.int32)
    given = [moved(t) for t in (places.int(), three, gradients, torch.arange(4).int())]
    passes(here, *given, step, BiasCorrections().of(step, 10, DEVICE), moved(ids[places].int()))
    host.adam_rows(whole, ids[places[:3]], gradients[:3], step)
    for name, ours in copied(here, "cpu")._asdict().items():
        assert torch.equal(bits(ours), bits(getattr(whole, name)[ids])), name
