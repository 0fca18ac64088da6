"""A thousand steps of rows that come and go, against `torch.optim.AdamW` in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam

STEPS, ROWS, WIDTH = 1000, 48, 33
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def touched_rows() -> list[Tensor]:
    """For every step, the rows that get a gradient: some often, some rarely, some once in 500 steps, some never."""
    generator = torch.Generator().manual_seed(7)
    chance = torch.logspace(-0.1, -2.5, ROWS)
    pattern = torch.rand(STEPS, ROWS, generator=generator) < chance
    pattern[:, -6:] = False
    pattern[5::500, -6] = True
    pattern[499::500, -5] = True
    pattern[0, -4] = pattern[501, -4] = True
    pattern[3, -3] = True
    pattern[STEPS - 1, -2] = True
    return [step.nonzero().flatten() for step in pattern]


def gradients(rows: Tensor, step: int) -> Tensor:
    """Of very different sizes from row to row; a column that never gets any; signs that change or stay."""
    generator = torch.Generator().manual_seed(1000 + step)
    grad = torch.randn(len(rows), WIDTH, generator=generator) + 0.3
    grad[:, 3] = 0
    return grad * torch.logspace(-5, 1, ROWS)[rows, None]


def make(dtype: torch.dtype, mode: str) -> tuple[PartiallyOffloadedTensor, SparseCPUAdam]:
    table = PartiallyOffloadedTensor("t", ROWS, WIDTH, device="cpu", compute_dtype=dtype, resident=False)
    start = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    start[5] = 0
    table.fill(start)
    return table, SparseCPUAdam([table], mode=mode, **SETTINGS)


def train(table: PartiallyOffloadedTensor, optimizer: SparseCPUAdam, look: bool = False) -> None:
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS)
    for step, rows in enumerate(touched_rows()):
        table.accumulate(rows, gradients(rows, step))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if look and step % 7 == 0:
            table.gather(torch.arange(ROWS))
            optimizer.current_masters(table)


def train_torch(start: Tensor, dtype: torch.dtype, *, dense: bool) -> Tensor:
    """torch's AdamW: on the whole table, or on every row as a parameter of its own, which is idle without gradient."""
    parts = [start.to(dtype)] if dense else list(start.to(dtype))
    parameters = [torch.nn.Parameter(part.clone()) for part in parts]
    optimizer = torch.optim.AdamW(parameters, **SETTINGS)
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS)
    for step, rows in enumerate(touched_rows()):
        grad = gradients(rows, step).to(dtype)
        if dense:
            parameters[0].grad = torch.zeros(ROWS, WIDTH, dtype=dtype).index_copy(0, rows, grad)
        else:
            for parameter in parameters:
                parameter.grad = None
            for row, g in zip(rows.tolist(), grad, strict=True):
                parameters[row].grad = g
        optimizer.step()
        scheduler.step()
    return parameters[0].detach() if dense else torch.stack([p.detach() for p in parameters])


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest value of its row."""
    scale = exact.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return float(((found.double() - exact).abs() / scale).max())


@pytest.mark.parametrize("mode", ["dense_equivalent", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps_stay_as_near_to_float64_as_torch_does(mode, dtype):
    table, optimizer = make(dtype, mode)
    start = table.master.clone()
    train(table, optimizer)
    found = optimizer.current_masters(table)
    exact = train_torch(start, torch.float64, dense=mode == "dense_equivalent")
    theirs = error(train_torch(start, torch.float32, dense=mode == "dense_equivalent"), exact)
    ours = error(found, exact)
    print(f"{mode} {dtype}: error {ours:.2e}, torch's AdamW in fp32 {theirs:.2e}")
    assert ours <= 2 * theirs
    # The two modes are far apart, so that one cannot pass for the other.
    other = train_torch(start, torch.float64, dense=mode == "lazy")
    assert error(found, other) > 1000 * ours


def test_looking_changes_nothing():
    """Values are brought to date for whoever reads them, and stay stored as they were."""
    results = []
    for look in (False, True):
        table, optimizer = make(torch.bfloat16, "dense_equivalent")
        train(table, optimizer, look)
        results.append([plane.clone() for plane in optimizer.saved_planes(table).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gather_is_up_to_date_and_a_resident_table_is_not():
    for resident in (False, True):
        table = PartiallyOffloadedTensor("t", 4, 5, device="cpu", compute_dtype=torch.float32, resident=resident)
        table.fill(torch.ones(4, 5))
        optimizer = SparseCPUAdam([table], mode="dense_equivalent", **SETTINGS)
        for rows in ([1], [2]):
            table.accumulate(torch.tensor(rows), torch.ones(len(rows), 5))
            optimizer.step()
            optimizer.zero_grad()
        stored, current = table.master[[1]].clone(), optimizer.current_masters(table)[[1]]
        assert (stored - current).abs().min() > 1e-4
        assert torch.equal(table.gather(torch.tensor([1])), stored if resident else current)


def test_state_dict_carries_the_history():
    table, optimizer = make(torch.float32, "dense_equivalent")
    train(table, optimizer)
    again, resumed = make(torch.float32, "dense_equivalent")
    again.fill(table.master)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.current_masters(again), optimizer.current_masters(table))
    for t, o in ((table, optimizer), (again, resumed)):
        t.accumulate(torch.arange(ROWS), torch.ones(ROWS, WIDTH))
        o.step()
    assert torch.equal(again.master, table.master)


def test_eps_has_to_stay():
    """Idle rows make up for their steps with one eps."""
    table, optimizer = make(torch.float32, "dense_equivalent")
    table.accumulate(torch.tensor([1]), torch.ones(1, WIDTH))
    optimizer.step()
    optimizer.param_groups[0]["eps"] = 1e-6
    with pytest.raises(ValueError, match="eps changes from 1e-08 to 1e-06"):
        optimizer.step()
