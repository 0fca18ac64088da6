"""AdamW over rows that a device owns, in PyTorch; ``kernels/triton/adam.py`` does the same without waiting for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meft_kernels import rows as host
from meft_kernels.rows import AdamStep, RowTable

_STEPS_AT_ONCE = 1024


class BiasCorrections:
    """What the bias correction of a row is by its own number of the step. Powers of β are worked out once."""

    def __init__(self) -> None:
        self._betas: tuple[float, float] | None = None
        # 1 − β₁ᵗ and 1 / √(1 − β₂ᵗ) of the steps t = 0 … (of 0: NaN), float64.
        self._rests: Tensor
        self._roots: Tensor

    def of(self, step: AdamStep, most: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) of the steps t = 0 … ``most`` (of 0: NaN), [most + 1] float32."""
        if self._betas != step.betas:
            self._betas = step.betas
            self._rests, self._roots = (torch.tensor([math.nan], dtype=torch.float64) for _ in range(2))
        if self._rests.numel() <= most:
            # By the C library's pow, as the host has it.
            steps, (beta1, beta2) = range(self._rests.numel(), most + _STEPS_AT_ONCE), step.betas
            rests = [1 - math.pow(beta1, t) for t in steps]
            roots = [1 / math.sqrt(1 - math.pow(beta2, t)) for t in steps]
            self._rests, self._roots = (
                torch.cat((known, torch.tensor(new, dtype=torch.float64)))
                for known, new in ((self._rests, rests), (self._roots, roots))
            )
        # Divided by a tensor: a number would be multiplied by the inverse, which rounds twice.
        sizes = torch.tensor(step.lr, dtype=torch.float64) / self._rests[: most + 1]
        return sizes.float().to(device), self._roots[: most + 1].float().to(device)


def adam_rows(
    table: RowTable,
    rows: Tensor,
    count: Tensor,
    gradients: Tensor,
    slots: Tensor,
    step: AdamStep,
    corrections: tuple[Tensor, Tensor],
    ids: Tensor | None = None,
) -> Tensor:
    """As :func:`meft_kernels.rows.adam_rows` without idle rows to be brought to date; waits for the device.

    Args:
        table: on the device. rows: [U'] int32, distinct; count: [1] int32 of them.
        gradients: [S, d] float32, where ``slots`` [U'] int32 says.
        corrections: worked out here anew.
        ids: [U'] int32, by which random bits are drawn; ``None``: ``rows``.

    Returns:
        [1] int32: how many of the rows now have a compute copy that is infinite or NaN.
    """
    found = int(count)
    names = None if ids is None else ids[:found].long()
    grad = gradients.index_select(0, slots[:found].long())
    infinite = host.adam_rows(table, rows[:found].long(), grad, step, ids=names)
    return torch.tensor([infinite], dtype=torch.int32, device=rows.device)
