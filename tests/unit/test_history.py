"""`StepHistory` against dense AdamW in float64, taken through every step that a row missed, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from meft_engine.optim.history import Coast, StepHistory

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's: a division by 0, an overflow

Settings = tuple[float, float, tuple[float, float]]  # lr, weight decay, betas

# A pair (a, b) is rounded to float32 twice, and the quadrature may err by a little more: relative to |P w| + |m| Σ.
TOLERANCE = 2 * 2.0**-24 + 2.0**-26 + 1e-9
LAST = 3000
IDLE = (0, 1, 2, 5, 30, 500, 3000)

USUAL = [(0.9, 0.999), (0.8, 0.95), (0.95, 0.9999), (0.0, 0.999), (0.9, 0.9999), (0.9, 0.95)]
# The first moment outlives the root of the second, so that √v b falls below ε while m still counts; or v is gone.
UNUSUAL = [(0.99, 0.9), (0.9, 0.8), (0.5, 0.0), (0.0, 0.0)]


def constant(step: int) -> tuple[float, float]:
    return 3e-3, 1.0


def cosine(step: int) -> tuple[float, float]:
    return 5e-3 * (1 + math.cos(math.pi * step / LAST)), 1.0


def warm_up(step: int) -> tuple[float, float]:
    """From 0 in 100 steps, and on to exactly 0 at the end."""
    return 1e-2 * (min((step - 1) / 100, 1.0) if step < LAST - 40 else 0.0), 1.0


def one_cycle(step: int) -> tuple[float, float]:
    """Up and down again every 600 steps, while β₁ goes down and up, as torch's OneCycleLR has it."""
    wave = 0.5 - 0.5 * math.cos(2 * math.pi * step / 600)
    return 1e-5 + 1e-2 * wave, 1 - 0.1 * wave


def settings(schedule: Callable, betas: tuple[float, float], weight_decay: float, steps: int = LAST) -> list[Settings]:
    def at(step: int) -> Settings:
        lr, share = schedule(step)
        return lr, weight_decay, (betas[0] * share, betas[1])

    return [at(step) for step in range(1, steps + 1)]


def history_of(all_settings: list[Settings]) -> StepHistory:
    history = StepHistory()
    for each in all_settings:
        history.append(*each)
    return history


class Dense:
    """Rows [n, k] of float64 that take every step from the one after ``since`` on, with gradients of 0."""

    def __init__(self, since: list[int], w: np.ndarray, m: np.ndarray, v: np.ndarray, eps: float) -> None:
        self.since, self.eps, self.step = np.array(since), eps, 0
        self.w, self.m, self.v = (np.tile(x, (len(since), 1)) for x in (w, m, v))
        self.moved = np.zeros_like(self.w)  # |m| Σ, what the moments added

    def take(self, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        self.step += 1
        n = int(np.searchsorted(self.since, self.step))  # rows are sorted by ``since``; these are on their way
        w, m, v, moved = self.w[:n], self.m[:n], self.v[:n], self.moved[:n]
        m *= betas[0]
        v *= betas[1]
        w *= 1 - lr * weight_decay
        moved *= 1 - lr * weight_decay
        m_hat, v_hat = m / (1 - betas[0] ** self.step), v / (1 - betas[1] ** self.step)
        update = lr * m_hat / (np.sqrt(v_hat) + self.eps)
        w -= update
        moved += np.abs(update)


def apply(coast: Coast, w: np.ndarray, m: np.ndarray, v: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """What the coefficients say, in float64."""
    lines = coast.coefficients.double().numpy()[coast.of_row.numpy()]
    p, first, second = (lines[:, i, None] for i in range(3))
    root = np.sqrt(v)
    terms = sum(lines[:, i, None] / (root * lines[:, i + 1, None] + eps) for i in range(3, lines.shape[1], 2))
    return p * w - m * terms, first * m, second * v


def elements(betas: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, m, v: moments alone, moments and weights, weights alone; √v from far below ε to far above."""
    roots = [0.0, *np.logspace(-12, 2, 15), *([1e6, 1e12, 1e18] if betas in USUAL else [])]
    w = np.array([0.0] * len(roots) + [0.7] * len(roots) + [1.3])
    return w, np.array([1.0] * len(roots) + [-1e-3] * len(roots) + [0.0]), np.array([*roots, *roots, 0.0]) ** 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", [constant, cosine, warm_up, one_cycle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("betas", USUAL + UNUSUAL, ids=str)
def test_moves_rows_as_dense_adamw_does(betas: tuple[float, float], schedule: Callable, weight_decay: float) -> None:
    eps = 1e-8
    w, m, v = elements(betas)
    ends = [1, 2, 6, 31, 530, LAST]
    since = sorted({max(end - idle, first) for end in ends for idle in IDLE for first in (0, 1) if first <= end})
    dense, history = Dense(since, w, m, v, eps), StepHistory()
    for each in settings(schedule, betas, weight_decay):
        dense.take(*each)
        history.append(*each)
        if history.steps not in ends:
            continue
        n = int(np.searchsorted(dense.since, history.steps, side="right"))
        coast = history.coast(torch.tensor(since[:n]), eps)
        got_w, got_m, got_v = apply(coast, w, m, v, eps)
        decayed = np.abs(coast.coefficients[coast.of_row.long(), :1].double().numpy() * w)
        assert (np.abs(got_w - dense.w[:n]) <= TOLERANCE * (decayed + dense.moved[:n])).all()
        np.testing.assert_allclose(got_m, dense.m[:n], rtol=1e-7, atol=1e-44)
        np.testing.assert_allclose(got_v, dense.v[:n], rtol=1e-7, atol=1e-44 * v.max())
        assert (coast.coefficients[:, 3:] >= 0).all()
        terms = (coast.coefficients.shape[1] - 3) // 2
        assert terms <= (10 if betas in USUAL else 64)


@pytest.mark.parametrize("eps", [0.0, 1e-15, 1e-4, 1.0])
def test_other_eps(eps: float) -> None:
    w, m, v = (x[1:17] for x in elements((0.9, 0.999)))
    since = [1, 3, 500, 890, 899]
    steps = settings(one_cycle, (0.9, 0.999), 0.1, 900)
    dense = Dense(since, w, m, v + (eps == 0) * 1e-20, eps)
    for each in steps:
        dense.take(*each)
    got, _, _ = apply(history_of(steps).coast(torch.tensor(since), eps), w, m, v + (eps == 0) * 1e-20, eps)
    np.testing.assert_allclose(got, dense.w, rtol=TOLERANCE)


def test_moves_rows_as_torch_does() -> None:
    """Gradients until ``since``, gradients of 0 from then on, under a schedule of lr and betas."""
    since, steps = 40, settings(one_cycle, (0.9, 0.99), 0.1, 400)
    parameter = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], eps=1e-8)
    before: dict[str, Tensor] = {}
    for step, (lr, weight_decay, betas) in enumerate(steps, 1):
        optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay, betas=betas)
        scales = torch.logspace(-10, 2, 50, dtype=torch.float64)
        parameter.grad = scales * torch.randn(50).double() if step <= since else torch.zeros_like(parameter)
        optimizer.step()
        if step == since:
            before = {"w": parameter.detach().clone()}
            before |= {key: optimizer.state[parameter][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    state = optimizer.state[parameter]
    coast = history_of(steps).coast(torch.tensor([since]), 1e-8)
    got = apply(coast, *(x.numpy() for x in before.values()), 1e-8)
    for ours, theirs in zip(got, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours)[0], theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max()))


def test_rows_without_moments_only_decay() -> None:
    steps = settings(cosine, (0.9, 0.999), 0.1)
    coast = history_of(steps).coast(torch.tensor([0]), 1e-8)
    w, m, v = apply(coast, np.array([2.0]), np.zeros(1), np.zeros(1), 1e-8)
    assert w.item() == pytest.approx(2.0 * math.prod(1 - lr * decay for lr, decay, _ in steps), rel=1e-7)
    assert m.item() == v.item() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_lines_of_rows(dtype: torch.dtype) -> None:
    """One line for each idle time; rows that are current keep what they have; short lines end in terms of 0."""
    history = history_of(settings(constant, (0.9, 0.999), 0.1, 100))
    coast = history.coast(torch.tensor([100, 3, 99, 3, 100, 0], dtype=dtype), 1e-8)
    assert (coast.of_row.dtype, coast.coefficients.dtype) == (torch.int32, torch.float32)
    lines = coast.coefficients[coast.of_row.long()]
    assert len(coast.coefficients) == 4 and coast.coefficients.shape[1] % 2 == 1
    assert torch.equal(lines[1], lines[3])
    assert not torch.equal(lines[1], lines[5])
    nothing = torch.tensor([0.0, 1.0]).repeat((lines.shape[1] - 3) // 2)
    assert torch.equal(lines[0], torch.cat([torch.ones(3), nothing]))
    assert torch.equal(lines[0], lines[4])
    assert lines[2, 3] > 0 and torch.equal(lines[2, 5:], nothing[2:])


def test_nothing_to_do_when_no_row_is_idle() -> None:
    history = StepHistory()
    assert history.coast(torch.zeros(3, dtype=torch.int32), 1e-8) is None
    history.append(1e-3, 0.0, (0.9, 0.999))
    assert history.coast(torch.ones(3, dtype=torch.int32), 1e-8) is None
    assert history.coast(torch.empty(0, dtype=torch.int32), 1e-8) is None


@pytest.mark.parametrize("lr", [0.0, -1e-20])
def test_steps_with_no_rate_leave_the_weights(lr: float) -> None:
    history = history_of([(lr, 0.1, (0.9, 0.5))] * 3)
    coast = history.coast(torch.tensor([0, 1]), 1e-8)
    expected = torch.tensor([[1, 0.729, 0.125, 0, 1], [1, 0.81, 0.25, 0, 1]])
    torch.testing.assert_close(coast.coefficients, expected)


def test_a_step_after_coasting_counts() -> None:
    steps = settings(one_cycle, (0.9, 0.999), 0.1, 40)
    since = torch.tensor([3, 17, 39])
    history = history_of(steps[:-1])
    history.coast(since, 1e-8)
    history.append(*steps[-1])
    assert torch.equal(history.coast(since, 1e-8).coefficients, history_of(steps).coast(since, 1e-8).coefficients)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9)], ids=str)
def test_what_was_asked_before_does_not_matter(betas: tuple[float, float]) -> None:
    """Lines that are kept for an eps serve no other."""
    steps, w_m_v = settings(one_cycle, betas, 0.1, 900), [x[:17] for x in elements(betas)]
    history = history_of(steps)
    for since in (torch.tensor([3, 17]), torch.arange(300), torch.tensor([17])):
        history.coast(since, 1.0)
        history.coast(since, 1e-8)
    for eps in (1e-8, 1.0):
        kept, fresh = (h.coast(torch.tensor([17]), eps) for h in (history, history_of(steps)))
        np.testing.assert_allclose(apply(kept, *w_m_v, eps)[0], apply(fresh, *w_m_v, eps)[0], rtol=2 * TOLERANCE)


def test_state_brings_back_the_same_coefficients() -> None:
    steps = settings(one_cycle, (0.9, 0.999), 0.1, 700)
    history, other = history_of(steps), history_of(settings(constant, (0.5, 0.5), 0.0, 900))
    state = history.state()
    assert state.dtype == torch.float64
    assert state.tolist() == [[lr, decay, *betas] for lr, decay, betas in steps]
    since = torch.arange(0, 701, 10)
    other.coast(since, 1e-8)
    other.load(state)
    assert other.steps == 700
    assert torch.equal(other.coast(since, 1e-8).coefficients, history.coast(since, 1e-8).coefficients)
    state.zero_()
    assert history.state()[0, 1] == 0.1
    other.load(StepHistory().state())
    assert other.steps == 0 and other.state().shape == (0, 4)


def test_a_long_history_has_few_terms() -> None:
    history = history_of(settings(cosine, (0.9, 0.999), 0.01, 20000))
    coast = history.coast(torch.arange(0, 20000, 40), 1e-8)
    assert len(coast.coefficients) == 500 and coast.coefficients.shape[1] <= 3 + 2 * 8
    assert coast.coefficients.isfinite().all()


@pytest.mark.parametrize("lr, weight_decay", [(1.0, 1.0), (0.5, 4.0), (math.nan, 0.1)])
def test_refuses_a_decay_that_turns_weights_around(lr: float, weight_decay: float) -> None:
    history = StepHistory()
    with pytest.raises(ValueError, match=r"lr .* weight_decay .* lower one of the two"):
        history.append(lr, weight_decay, (0.9, 0.999))
    assert history.steps == 0


@pytest.mark.parametrize("since", [[0, 3], [-1, 2]])
def test_refuses_rows_of_another_history(since: list[int]) -> None:
    history = history_of([(1e-3, 0.0, (0.9, 0.999))] * 2)
    with pytest.raises(ValueError, match="load these rows' own history"):
        history.coast(torch.tensor(since), 1e-8)


def test_a_line_does_not_depend_on_its_company():
    """A read in between, which asks for other idle times, must not change a bit of what the next update uses."""
    since = torch.tensor([0, 3, 40, 41, 250, 397, 398, 399])
    lines = []
    for groups in ([since], since.split(1), [since.flip(0)[:3], since[:5]], [torch.arange(400), since]):
        history = StepHistory()
        for step in range(400):
            history.append(1e-3 * (1 + step % 7), 0.1, (0.9, 0.999))
        for group in groups:
            history.coast(group, 1e-8)
        found = history.coast(since, 1e-8)
        lines.append(found.coefficients[found.of_row.long()])
    assert all(torch.equal(line, lines[0]) for line in lines)
