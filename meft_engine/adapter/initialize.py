"""Where the adapter starts: keys from the FFN's own rows or at random, the router from its experts' mean keys."""

from __future__ import annotations

import torch
from torch import Tensor

_NOISE = 0.01


def initial_keys(gate_weight: Tensor, rows: int, method: str, seed: int) -> Tensor:
    """The keys of one layer.

    ``ffn``: the FFN's gate rows in their order; beyond the intermediate size they repeat, each repetition with 1 %
    Gaussian noise of its row's own root mean square. ``random``: Gaussian with variance 1 / d. No two rows are equal.

    Args:
        gate_weight: [f, d] the FFN's gate projection, any float dtype and device.
        rows: r. method: ``ffn`` or ``random``. seed: of the layer.

    Returns:
        [r, d] float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    width = gate_weight.shape[1]
    noise = torch.randn(rows, width, generator=generator)
    if method == "random":
        return noise.mul_(width**-0.5)
    source = gate_weight.detach().float().cpu()
    keys = source[torch.arange(rows) % source.shape[0]]
    repeated = torch.arange(rows) >= source.shape[0]
    repeated |= _equals_an_earlier_row(keys) & ~repeated
    scale = keys.square().mean(1, keepdim=True).sqrt()
    # An all-zero row would stay zero under noise of its own size, and so would an all-zero matrix.
    scale = torch.where(scale > 0, scale, float(source.square().mean().sqrt()) or width**-0.5)
    return keys + torch.where(repeated[:, None], _NOISE * scale * noise, 0)


def initial_router(keys: Tensor, num_experts: int) -> Tensor:
    """[N, d]: the mean key of each expert (MEFT, section 3.3), from keys [r, d] whose experts are consecutive rows."""
    return keys.view(num_experts, -1, keys.shape[1]).mean(1)


def _equals_an_earlier_row(rows: Tensor) -> Tensor:
    """[r] bool, by an exact integer hash of the rows' bits (random odd multipliers, wrapping sum)."""
    generator = torch.Generator().manual_seed(0)
    multipliers = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) | 1
    # Adding zero turns -0.0 into 0.0, which compare equal but differ in their bits.
    hashes = ((rows + 0.0).view(torch.int32).long() * multipliers).sum(1)
    first = {}
    return torch.tensor([first.setdefault(value, i) != i for i, value in enumerate(hashes.tolist())])
