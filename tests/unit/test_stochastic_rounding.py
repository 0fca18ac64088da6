"""bf16 moments: rounding that is right on average, by bits that depend on nothing but what they are a hash of."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim import sparse_adam
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_kernels.rows import AdamStep, RowTable, paired_moments

BF16 = torch.bfloat16
# Shares of the way from one bf16 to the next, an awkward mantissa, both signs, and magnitudes from tiny to huge.
NUMBERS = torch.tensor(
    [1 + 2**-9, 1 + 2**-12, 1 + 127 * 2**-14, -3.141592, 1.7e-20, -2.6e17, 2.0 - 2**-20, 1 / 3, 1.5, -0.0],
    dtype=torch.float32,
)


@pytest.fixture(autouse=True)
def passes(each_passes, monkeypatch) -> ModuleType:
    monkeypatch.setattr(sparse_adam, "row_passes", lambda: each_passes)
    return each_passes


def draw(passes: ModuleType, grad: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """``grad`` and its squares, rounded: with betas of 0 they are what is stored as moments."""
    high, low = torch.zeros(grad.shape, dtype=BF16), torch.zeros(grad.shape, dtype=torch.int16)
    moments, step = paired_moments(torch.zeros(*grad.shape, 2, dtype=BF16)), torch.zeros(len(grad), dtype=torch.int32)
    table = RowTable(high, low, *moments, step)
    step = AdamStep(grad_scale=1.0, lr=1e-6, betas=(0.0, 0.0), eps=1e-8, decay=1.0, seed=seed)
    passes.adam_rows(table, torch.arange(len(grad)), grad, step, threads=2)
    return table.exp_avg.float(), table.exp_avg_sq.float()


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 toward zero, and the next away from it, as float32."""
    bits = x.view(torch.int32)
    below = bits & -0x10000
    return below.view(torch.float32), (below + 0x10000).view(torch.float32)


def optimizer_seed() -> int:
    """The one that the optimizer gives a table's update."""
    table = PartiallyOffloadedTensor("t", 1, 1, device="cpu", compute_dtype=BF16, resident=False)
    optimizer = SparseCPUAdam([table], moments_dtype=BF16)
    table.accumulate(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1))
    (update,) = optimizer.updates()
    return update.adam.seed


@pytest.mark.parametrize("which", [0, 1], ids=["first moment", "second moment"])
def test_the_mean_is_the_number_and_only_neighbours_occur(passes, which):
    """Within four standard errors, over consecutive rows; what is a bf16 already stays as it is."""
    count = 1 << 15
    found = draw(passes, NUMBERS.repeat(count, 1), optimizer_seed())[which].double()
    numbers = NUMBERS if which == 0 else NUMBERS * NUMBERS
    below, above = (x.double() for x in neighbours(numbers))
    assert ((found == below) | (found == above)).all()
    up = (numbers.double() - below) / (above - below)
    exact = up == 0
    assert exact.sum() >= 2 and (found[:, exact] == numbers[exact].double()).all()
    share = (found == above).double().mean(0)
    error = (up * (1 - up) / count).sqrt()
    assert ((share - up).abs() <= 4 * error).all(), (share - up) / error
    assert (~exact).sum() >= 7 and (error[~exact] < 3e-3).all()


def test_bits_of_moments_columns_rows_and_steps_do_not_go_together():
    """Correlations of the rounding errors, in their standard deviations, are those of chance."""
    count, width = 1 << 12, 24
    errors = []
    for step in range(2):
        table = PartiallyOffloadedTensor("t", count, width, device="cpu", compute_dtype=BF16, resident=False)
        optimizer = SparseCPUAdam([table], moments_dtype=BF16, betas=(0.0, 0.0))
        optimizer.state[table.handle]["step"].fill_(step)
        grad = torch.rand(count, width) + 1
        table.accumulate(torch.arange(count), grad.clone())
        optimizer.step()
        for key, exact in (("exp_avg", grad), ("exp_avg_sq", grad * grad)):
            below, above = neighbours(exact)
            up = (exact.double() - below) / (above.double() - below)
            went_up = (optimizer.state[table.handle][key].float() == above).double()
            spread = (up * (1 - up)).sqrt()
            errors.append(torch.where(spread > 0, (went_up - up) / spread, 0.0))
    m, v, m_next, _ = errors
    pairs = {"moments": (m, v), "steps": (m, m_next)}
    for name, x in (("m", m), ("v", v)):
        for shift in (1, 8, 16):
            pairs[f"columns of {name}, {shift} apart"] = (x[:, shift:], x[:, :-shift])
        pairs[f"rows of {name}"] = (x[1:], x[:-1])
    for name, (x, y) in pairs.items():
        assert abs(float((x * y).mean())) < 4 / math.sqrt(x.numel()), name
    assert float((m * m).mean()) == pytest.approx(1, abs=0.05)


def moments_after(
    name: str = "t", seed: int = 0, first_step: int = 0, threads: int = 1, rows: Tensor | None = None
) -> Tensor:
    """[2, 64, 40]: the moments of a table after one step, of which each is about halfway between two bf16."""
    table = PartiallyOffloadedTensor(name, 64, 40, device="cpu", compute_dtype=BF16, resident=False)
    optimizer = SparseCPUAdam([table], betas=(0.0, 0.0), moments_dtype=BF16, seed=seed, threads=threads)
    optimizer.state[table.handle]["step"].fill_(first_step)
    rows = torch.arange(64) if rows is None else rows
    table.accumulate(rows, torch.full((len(rows), 40), 1 + 17 / 256))
    optimizer.step()
    return torch.stack([optimizer.state[table.handle][key] for key in ("exp_avg", "exp_avg_sq")])


def test_bits_depend_on_seed_table_step_row_and_column_and_on_nothing_else():
    first = moments_after()
    assert torch.equal(first, moments_after())
    assert torch.equal(first, moments_after(threads=3))
    order = torch.randperm(64)
    assert torch.equal(first, moments_after(rows=order))
    some = order[:9]
    assert torch.equal(first[:, some], moments_after(rows=some)[:, some])
    for other in (
        moments_after(name="u"),
        moments_after(seed=1),
        moments_after(seed=2**32 - 1),
        moments_after(first_step=1),
    ):
        # Half of the elements or so: every row differs, and not in one place only.
        assert (other != first).any(-1).all() and 0.2 < (other != first).float().mean() < 0.7
    for x in first:
        assert len({tuple(row) for row in x.float().tolist()}) == 64
        assert len({tuple(column) for column in x.T.float().tolist()}) == 40
    assert len({tuple(moments_after(seed=seed).flatten().tolist()) for seed in range(9)}) == 9


def test_moments_follow_the_exact_ones_over_many_steps():
    """Rounding to nearest would leave a second moment where it is: each step moves it by less than half a bit."""
    table = PartiallyOffloadedTensor("t", 256, 16, device="cpu", compute_dtype=BF16, resident=False)
    optimizer = SparseCPUAdam([table], lr=1e-5, betas=(0.9, 0.999), moments_dtype=BF16)
    state, v = optimizer.state[table.handle], 1.0
    state["exp_avg_sq"].fill_(v)
    for _ in range(200):
        table.accumulate(torch.arange(256), torch.full((256, 16), 0.5))
        optimizer.step()
        optimizer.zero_grad()
        v = 0.999 * v + 0.001 * 0.25
    assert v < 0.9 and float(state["exp_avg_sq"].double().mean()) == pytest.approx(v, rel=2e-3)
    assert float(state["exp_avg"].double().mean()) == pytest.approx(0.5, rel=2e-3)
