"""The settings of every step, and where AdamW without gradients takes a row that slept through some of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from meft_kernels.rows import Coast

# What an fp32 result does not show: the relative error of a quadrature; the share of a sum that its tail may hold.
_TOLERANCE, _TAIL = 2.0**-26, 2.0**-30
_LARGEST_ROOT = 2.0**20  # √v up to which that holds for any betas: beside ε, a b below ε / this counts as 0
_LEAST_BETA = 1e-100  # stands for a beta of 0, which has no logarithm: one step takes moments out of fp32's range
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 64)
_BLOCK_TERMS = 1 << 13  # a block of idle times with about so many terms stays in the cache


class StepHistory:
    """The settings of every step of one parameter group, from which rows catch up on the steps that they missed.

    At a step s without gradients, AdamW moves a row that was current through step τ < s by −m a / (√v b + ε), where
    b² = Πβ₂ / (1 − β₂ˢ) and a = lr Πβ₁ / (1 − β₁ˢ), products over τ+1 … s, times the decay Π(1 − lr λ) of later steps.
    The sum over hundreds of steps is an integral of 1 / (√v b + ε) over a measure with masses a at points b, whatever
    v is: a Gauss quadrature gives it, to fp32's precision for every v, with a handful of pairs (a, b).
    """

    def __init__(self) -> None:
        # A column for the initial state and for every step: the four settings; the sums so far of log(1 − lr λ), log β₁
        # and log β₂; log a and log b, but for what depends on τ or on the present alone.
        self._record, self._steps, self._tails = np.zeros((9, 256)), 0, None
        self._lines: dict[float, dict[int, np.ndarray]] = {}  # of an eps, of a step τ

    @property
    def steps(self) -> int:
        """How many steps are completed."""
        return self._steps

    def append(self, lr: float, weight_decay: float, betas: tuple[float, float]) -> None:
        """Note the settings of a completed step. An lr that a schedule's rounding took below 0 counts as 0."""
        if not lr * weight_decay < 1:
            raise ValueError(f"lr {lr:g} times weight_decay {weight_decay:g} has to be below 1: lower one of the two")
        step, logs = self._steps + 1, [math.log1p(-lr * weight_decay), *(math.log(max(b, _LEAST_BETA)) for b in betas)]
        if step == self._record.shape[1]:
            self._record = np.concatenate([self._record, np.zeros_like(self._record)], axis=1)
        decay, first, second = self._record[4:7, step - 1] + logs
        log_a = (math.log(lr) if lr > 0 else -math.inf) - decay + first - math.log(-math.expm1(step * logs[1]))
        log_b = 0.5 * (second - math.log(-math.expm1(step * logs[2])))
        self._record[:, step] = (lr, weight_decay, *betas, decay, first, second, log_a, log_b)
        self._steps, self._lines, self._tails = step, {}, None

    def coast(self, since: Tensor, eps: float) -> Coast | None:
        """Coefficients for rows that are current through the steps ``since``; None if no row missed a step."""
        values, of_row = torch.unique(since, return_inverse=True)
        times = values.tolist()
        if times and not 0 <= times[0] <= times[-1] <= self._steps:
            raise ValueError(f"since {times[0]} … {times[-1]} leaves 0 … {self._steps}: load these rows' own history")
        if not times or times[0] == self._steps:
            return None
        memo = self._lines.setdefault(eps, {})
        if missing := [time for time in times if time not in memo]:
            memo.update(zip(missing, self._condense(np.array(missing), eps), strict=True))
        coefficients = np.zeros((len(times), max(5, *(len(memo[time]) for time in times))), dtype=np.float32)
        coefficients[:, 4::2] = 1.0
        for row, time in zip(coefficients, times, strict=True):
            row[: len(memo[time])] = memo[time]
        return Coast(of_row.to(torch.int32), torch.from_numpy(coefficients))

    def state(self) -> Tensor:
        """[T, 4] float64: lr, weight decay, β₁ and β₂ of every step."""
        return torch.from_numpy(self._record[:4, 1 : self._steps + 1].T.copy())

    def load(self, state: Tensor) -> None:
        """Become the history that gave ``state``."""
        self.__init__()
        for lr, weight_decay, beta1, beta2 in state.tolist():
            self.append(lr, weight_decay, (beta1, beta2))

    def _condense(self, times: np.ndarray, eps: float) -> list[np.ndarray]:
        """A line P, M, V, (a, b), … in float64 for each of ``times``."""
        sums, (log_a, log_b) = np.split(self._record[4:, : self._steps + 1], [3])
        lines = list(np.exp(sums[:, -1:] - sums[:, times]).T)
        shift_a, shift_b, floor = sums[0, -1] - sums[1, times], -0.5 * sums[2, times], max(eps / _LARGEST_ROOT, 1e-200)
        # A tail is dropped if it is small for v → ∞, when terms are as a / b: b falls with s, so that the tail's share
        # rises with v. Or if it is small at the largest root even with b = 0, beside all others with the first b.
        if self._tails is None:
            tails = np.logaddexp.accumulate(np.stack([log_a - log_b, log_a])[:, :0:-1], axis=1)[:, ::-1]
            self._tails = np.pad(tails, ((0, 0), (0, 1)), constant_values=-np.inf)
        limits = self._tails[:, times] + math.log(_TAIL)
        limits[1] -= np.logaddexp(0.0, log_b[np.minimum(times + 1, self._steps)] + shift_b - math.log(floor))
        ends = np.minimum(*(np.searchsorted(-tail, -limit) for tail, limit in zip(self._tails, limits, strict=True)))
        counts = np.maximum(ends - times, 0)
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        while order.size:
            # Padded to a length of its own, so that a line has the same bits whichever others are asked for with it.
            padded = 1 << int(counts[order[0]] - 1).bit_length()
            alike = np.count_nonzero(2 * counts[order] > padded)
            block, order = np.split(order, [min(alike, max(1, _BLOCK_TERMS // padded))])
            offsets = np.arange(1, padded + 1)
            steps = np.minimum(times[block, None] + offsets, self._steps)
            # On the axis z = log(b + floor), 1 / (√v b + ε) is equally smooth at all scales of b: few points do.
            z = np.logaddexp(log_b[steps] + shift_b[block, None], math.log(floor))
            log_mass = np.where(offsets <= counts[block, None], log_a[steps] + shift_a[block, None] - 0.5 * z, -np.inf)
            for i, (points, log_masses) in zip(block, _quadratures(z, log_mass), strict=True):
                pairs = np.exp(log_masses + 0.5 * points), np.maximum(np.exp(points) - floor, 0.0)
                lines[i] = np.concatenate([lines[i], np.stack(pairs, axis=1).ravel()])
        return lines


def _quadratures(z: np.ndarray, log_mass: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every row, few points z and log masses with the same Σ mass / (e^(z/2) + y e^(−z/2)) for all y ≥ 0.

    Lanczos: in the basis that orthogonalises √mass, z √mass, z² √mass …, multiplication by z is a tridiagonal matrix.
    Its eigenvalues are the points, the squares of its eigenvectors' first elements the masses.
    """
    found, pending = list(zip(z, log_mass, strict=True)), np.ones(len(z), dtype=bool)
    log_total = np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
    mass, low, high = np.exp(log_mass - log_total), z.min(axis=1, keepdims=True), z.max(axis=1, keepdims=True)
    y = np.exp(np.concatenate([low - np.inf, low + (high - low + 2) * np.linspace(0, 1, 10) - 1, high + 9], axis=1))

    def integrals(points: np.ndarray, masses: np.ndarray) -> np.ndarray:
        root = np.exp(0.5 * points)[:, None]
        return (masses[:, None] / (root + y[..., None] / root)).sum(axis=-1)

    exact, basis = integrals(z, mass), np.sqrt(mass)[:, None]
    matrix = np.zeros((len(z), _SIZES[-1] + 1, _SIZES[-1] + 1))
    for size in range(1, _SIZES[-1] + 1):
        following = z[:, None] * basis[:, -1:]
        for _ in range(2):  # after one pass, rounding errors would grow
            overlap = following @ basis.transpose(0, 2, 1)
            following -= overlap @ basis
            matrix[:, size - 1, size - 1] += overlap[:, 0, -1]
        if size in _SIZES:
            points, vectors = np.linalg.eigh(matrix[:, :size, :size])
            masses = vectors[:, 0] ** 2
            error = np.abs(integrals(points, masses) / exact - 1).max(axis=1)
            for i in np.flatnonzero(pending & (error <= _TOLERANCE)):
                found[i], pending[i] = (points[i], np.log(np.maximum(masses[i], 1e-300)) + log_total[i]), False
            if not pending.any():
                break
        norm = np.linalg.norm(following, axis=2, keepdims=True)
        norm[norm <= 1e-13 * (1 + np.abs(z).max(axis=1)[:, None, None])] = (
            np.inf
        )  # nothing is left: the points so far are exact
        basis = np.concatenate([basis, following / norm], axis=1)
        matrix[:, size, size - 1] = matrix[:, size - 1, size] = np.where(norm < np.inf, norm, 0.0)[:, 0, 0]
    return found
