"""`SparseCPUAdam` against `torch.optim.AdamW` and against a float64 oracle whose rows count their own steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim import sparse_adam
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_kernels import rows as rows_in_torch

WIDTH = 7


def make_table(rows: int, dtype: torch.dtype = torch.float32) -> PartiallyOffloadedTensor:
    table = PartiallyOffloadedTensor(f"t{rows}", rows, WIDTH, device="cpu", compute_dtype=dtype, resident=False)
    table.fill(torch.randn(rows, WIDTH))
    return table


def give(table: PartiallyOffloadedTensor, rows: Tensor, grad: Tensor) -> None:
    table.accumulate(rows, grad.clone())


class Oracle:
    """AdamW in float64, one row and one step at a time; a row that gets no gradient stays as it is."""

    def __init__(self, master: Tensor) -> None:
        self.w = master.double().clone()
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.t = [0] * len(master)

    def step(self, rows: Tensor, grad: Tensor, lr: float, betas: tuple, eps: float, weight_decay: float) -> None:
        (b1, b2) = betas
        for row, g in zip(rows.tolist(), grad.double(), strict=True):
            self.t[row] += 1
            self.w[row] *= 1 - lr * weight_decay
            self.m[row] = b1 * self.m[row] + (1 - b1) * g
            self.v[row] = b2 * self.v[row] + (1 - b2) * g * g
            m_hat, v_hat = self.m[row] / (1 - b1 ** self.t[row]), self.v[row] / (1 - b2 ** self.t[row])
            self.w[row] -= lr * m_hat / (v_hat.sqrt() + eps)


def random_rows(rows: int, share: float) -> Tensor:
    return (torch.rand(rows) < share).nonzero().flatten()


def optimizer_state(optimizer: SparseCPUAdam, table: PartiallyOffloadedTensor) -> dict[str, Tensor]:
    return {"master": table.master, **optimizer.state[table.handle]}


GROUPS = [
    {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
]


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=11),
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.0 if step < 2 else 1.0]),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.02], total_steps=40),
    ],
    ids=["constant", "cosine", "lambda", "one-cycle"],
)
def test_all_rows_touched_every_step_is_torch_adamw(schedule):
    """Two groups of their own lr, betas, eps and decay, several tables each, driven by torch's schedulers.

    One-cycle changes the betas too, from step to step.
    """
    tables = [make_table(rows) for rows in (11, 5, 3)]
    members = [tables[:2], tables[2:]]
    ours = SparseCPUAdam([{"tables": list(m), **g} for m, g in zip(members, GROUPS, strict=True)])
    assert ours.tables() == tables
    dense = {t.name: torch.nn.Parameter(t.master.double()) for t in tables}
    theirs = torch.optim.AdamW(
        [{"params": [dense[t.name] for t in m], **g} for m, g in zip(members, GROUPS, strict=True)]
    )
    schedulers = [schedule(o) for o in (ours, theirs)] if schedule else []
    rates = set()
    for _ in range(30):
        for table in tables:
            grad = torch.randn(table.rows, WIDTH) * torch.logspace(-3, 2, table.rows)[:, None]
            give(table, torch.arange(table.rows), grad)
            dense[table.name].grad = grad.double()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        rates.add(ours.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert (len(rates) > 20) == bool(schedule)
    for table in tables:
        torch.testing.assert_close(table.master.double(), dense[table.name].detach(), rtol=2e-5, atol=2e-6)
        expected = theirs.state[dense[table.name]]
        found = ours.state[table.handle]
        assert found["step"].tolist() == [30] * table.rows
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found[key].double(), expected[key], rtol=2e-5, atol=1e-7)


def test_float32_adamw_agrees_to_rounding():
    table = make_table(13)
    dense = torch.nn.Parameter(table.master.clone())
    ours, theirs = SparseCPUAdam([table], weight_decay=0.1), torch.optim.AdamW([dense], weight_decay=0.1)
    for _ in range(50):
        grad = torch.randn(13, WIDTH)
        give(table, torch.arange(13), grad)
        dense.grad = grad
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    torch.testing.assert_close(table.master, dense.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [None, 3 * WIDTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_touching_is_the_oracle_with_steps_of_each_row(monkeypatch, block, dtype):
    """Also in PyTorch, in blocks of three rows. What readers see is the updated master, rounded."""
    if block:
        monkeypatch.setattr(rows_in_torch, "_BLOCK_ELEMENTS", block)
        monkeypatch.setattr(sparse_adam, "row_passes", lambda: rows_in_torch)
    settings, table = GROUPS[1], make_table(29, dtype)
    optimizer, oracle = SparseCPUAdam([table], **settings), Oracle(table.master)
    for step in range(40):
        rows = random_rows(29, share=(0.1, 0.5, 0.02)[step % 3])
        grad = torch.randn(len(rows), WIDTH) * 10.0 ** (step % 5 - 2)
        give(table, rows, grad)
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(rows, grad, **settings)
    state = optimizer.state[table.handle]
    assert state["step"].tolist() == oracle.t and len(set(oracle.t)) > 4
    torch.testing.assert_close(table.master.double(), oracle.w, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(state["exp_avg"].double(), oracle.m, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"].double(), oracle.v, rtol=2e-5, atol=1e-6)
    assert torch.equal(table.gather(torch.arange(29)), table.master.to(dtype).float())


def test_first_steps_do_not_lose_digits_to_a_beta_near_one():
    """1 - β₂ᵗ in float32 would be off by four digits at the first step."""
    settings = {"lr": 1.0, "betas": (0.9, 0.99999), "eps": 1e-12, "weight_decay": 0.0}
    table = make_table(3)
    table.fill(torch.zeros(3, WIDTH))
    optimizer, oracle = SparseCPUAdam([table], **settings), Oracle(table.master)
    grad = torch.rand(3, WIDTH) + 1
    give(table, torch.arange(3), grad)
    optimizer.step()
    oracle.step(torch.arange(3), grad, **settings)
    torch.testing.assert_close(table.master.double(), oracle.w, rtol=1e-6, atol=0)


def test_untouched_rows_stay_bit_for_bit():
    """Weights, moments and steps, after they have been touched once and decay is on."""
    table, other = make_table(31), make_table(17)
    optimizer = SparseCPUAdam([table, other], lr=0.1, weight_decay=0.5)
    for member in (table, other):
        give(member, torch.arange(member.rows), torch.randn(member.rows, WIDTH))
    optimizer.step()
    optimizer.zero_grad()
    before = [{k: v.clone() for k, v in optimizer_state(optimizer, t).items()} for t in (table, other)]
    versions = table.version, other.version
    rows = torch.tensor([0, 7, 30])
    give(table, rows, torch.randn(3, WIDTH))
    optimizer.step()
    untouched = [row for row in range(31) if row not in rows.tolist()]
    for key, value in optimizer_state(optimizer, table).items():
        assert torch.equal(value[untouched], before[0][key][untouched]), key
        changed = value[rows] != before[0][key][rows]
        assert changed.all() if key == "step" else changed.any(1).all(), key
    for key, value in optimizer_state(optimizer, other).items():
        assert torch.equal(value, before[1][key]), key
    assert (table.version, other.version) == (versions[0] + 1, versions[1])


def test_no_gradient_and_no_rows_change_nothing():
    table = make_table(5)
    optimizer = SparseCPUAdam([table], lr=0.1, weight_decay=0.5)
    before = {k: v.clone() for k, v in optimizer_state(optimizer, table).items()}
    version = table.version
    optimizer.step()
    give(table, torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH))
    optimizer.step()
    assert optimizer.gradient_norm() == 0.0 and table.version == version
    assert all(torch.equal(v, before[k]) for k, v in optimizer_state(optimizer, table).items())


@pytest.mark.parametrize("scale", [0.25, 2.0**-16, 3.0])
def test_grad_scale_multiplies_every_gradient_and_leaves_it_as_it_was(scale):
    # An eps of some size, since without it AdamW would not feel the scale of its first gradient.
    tables, settings = [make_table(11) for _ in range(3)], {"lr": 0.1, "eps": 0.5, "weight_decay": 0.1}
    rows, grad = torch.tensor([1, 4, 10]), torch.randn(3, WIDTH)
    for table, given, factor in zip(tables, (grad, grad * scale, grad), (scale, 1.0, 1.0), strict=True):
        table.fill(tables[2].master)
        optimizer = SparseCPUAdam([table], **settings)
        give(table, rows, given)
        optimizer.step(grad_scale=factor)
        assert torch.equal(table.gradient().grad, given)
    torch.testing.assert_close(tables[0].master, tables[1].master, rtol=1e-6, atol=1e-7)
    assert (tables[0].master[rows] - tables[2].master[rows]).abs().max() > 1e-3


def test_gradient_norm_is_the_dense_one():
    tables = [make_table(rows) for rows in (31, 17, 5)]
    optimizer = SparseCPUAdam([{"tables": tables[:1]}, {"tables": tables[1:]}])
    assert optimizer.gradient_norm() == 0.0
    dense = [torch.zeros(t.rows, WIDTH, dtype=torch.float64) for t in tables]
    for _ in range(3):
        for table, total in zip(tables[:2], dense[:2], strict=True):
            rows = random_rows(table.rows, 0.3)
            grad = 100 * torch.randn(len(rows), WIDTH)
            total[rows] += grad.double()
            give(table, rows, grad)
    expected = math.sqrt(sum(float((total**2).sum()) for total in dense))
    assert expected > 0 and optimizer.gradient_norm() == pytest.approx(expected, rel=1e-6)
    # The third table has no gradient at all; now one that is not finite.
    for bad in (math.nan, math.inf):
        tables[2].clear_gradient()
        give(tables[2], torch.tensor([3]), torch.full((1, WIDTH), bad))
        assert not math.isfinite(optimizer.gradient_norm())
    optimizer.zero_grad()
    assert optimizer.gradient_norm() == 0.0 and all(t.gradient() is None for t in tables)


def test_step_runs_a_closure_and_returns_its_loss():
    table = make_table(3)
    optimizer = SparseCPUAdam([table], lr=0.1)
    before = table.master.clone()

    def closure() -> float:
        give(table, torch.tensor([1]), torch.ones(1, WIDTH))
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert (table.master != before).any(1).tolist() == [False, True, False]


def test_follow_takes_the_settings_of_the_group_that_is_followed():
    tables = [make_table(3), make_table(5)]
    optimizer = SparseCPUAdam(
        [{"tables": [tables[0]], "follows": 2}, {"tables": [tables[1]], "follows": 0, "lr_scale": 3.0}]
    )
    leader = [
        {"lr": 1e-3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "params": [], "name": "first"},
        {"lr": 9e9, "betas": (0.0, 0.0), "eps": 9.0, "weight_decay": 9.0, "params": []},
        {"lr": torch.tensor(2e-2), "betas": [0.7, 0.8], "eps": 1e-4, "weight_decay": 0.0, "params": []},
    ]
    optimizer.follow(leader)
    first, second = optimizer.param_groups
    assert (float(first["lr"]), *first["betas"]) == (pytest.approx(2e-2), 0.7, 0.8)
    assert (first["eps"], first["weight_decay"]) == (1e-4, 0.0)
    assert (second["lr"], second["betas"]) == (pytest.approx(3e-3), (0.5, 0.6))
    assert (second["eps"], second["weight_decay"]) == (1e-3, 0.7)
    assert [len(g["params"]) for g in (first, second)] == [1, 1] and "name" not in second
    # Following again starts from the leader's rate, not from the one before.
    optimizer.follow(leader)
    assert second["lr"] == pytest.approx(3e-3)
    oracle = Oracle(tables[0].master)
    give(tables[0], torch.tensor([2]), torch.ones(1, WIDTH))
    optimizer.step()
    oracle.step(torch.tensor([2]), torch.ones(1, WIDTH), 2e-2, (0.7, 0.8), 1e-4, 0.0)
    torch.testing.assert_close(tables[0].master.double(), oracle.w, rtol=1e-5, atol=1e-6)


def test_state_dict_goes_into_a_new_optimizer():
    """An interrupted run equals an uninterrupted one, bit for bit."""

    def run(table: PartiallyOffloadedTensor, optimizer: SparseCPUAdam, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            rows = torch.randperm(19, generator=generator)[:6].sort().values
            give(table, rows, torch.randn(6, WIDTH, generator=generator))
            optimizer.step()
            optimizer.zero_grad()

    start = make_table(19)
    tables = [start, make_table(19)]
    tables[1].fill(start.master)
    whole, part = SparseCPUAdam([tables[0]], lr=0.1), SparseCPUAdam([tables[1]], lr=0.1)
    run(tables[0], whole, range(10))
    run(tables[1], part, range(5))
    resumed = make_table(19)
    resumed.fill(tables[1].master)
    optimizer = SparseCPUAdam([resumed], lr=0.7)
    optimizer.load_state_dict(part.state_dict())
    run(resumed, optimizer, range(5, 10))
    for key, value in optimizer_state(whole, tables[0]).items():
        found = optimizer_state(optimizer, resumed)[key]
        assert torch.equal(found, value) and found.dtype == value.dtype, key


@pytest.mark.parametrize("rows", [1, 37])
def test_host_bytes_are_two_moments_and_a_step(rows):
    assert SparseCPUAdam([make_table(rows)]).host_bytes() == rows * (WIDTH * 8 + 4)
