"""Where the adapter starts: keys from the FFN's own rows or at random, the router from its experts' mean keys."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_engine.offload.memory import ReusedMemory

NOISE = 2.0
"""Noise in keys, as a multiple of the root mean square of the FFN's row: measured, by ``benchmarks/quality.py``."""


def initial_keys(gate_weight: Tensor, rows: int, method: str, seed: int, noise: float = NOISE) -> Tensor:
    """The keys of one layer. Rows of the FFN carry scale and directions that matter; noise sets them apart.

    ``ffn``: the FFN's gate rows in their order, from the first again where they run out, each with Gaussian noise of
    ``noise`` times its own root mean square. ``random``: Gaussian, as large as these.

    Args:
        gate_weight: [f, d] the FFN's gate projection, any float dtype and device.
        rows: r. method: ``ffn`` or ``random``. seed: of the layer. noise: its size.

    Returns:
        [r, d] float32 on the CPU; no two rows are equal.
    """
    count, width = gate_weight.shape
    # Not on the heap, where what stays of each layer would come to lie in the place of the last one's.
    keys = ReusedMemory().empty(rows, width)
    torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), out=keys)
    source = gate_weight.detach().cpu()
    # In float64: else the order in which a layout is summed would show in the keys.
    sizes = torch.linalg.vector_norm(source, dim=1, keepdim=True, dtype=torch.float64) / width**0.5
    overall = float(sizes.square().mean().sqrt()) or width**-0.5
    if method == "random":
        return keys.mul_(overall * (1 + noise**2) ** 0.5)
    # An all-zero row would stay zero under noise of its own size.
    sizes = noise * torch.where(sizes > 0, sizes, overall).float()
    for some in keys.split(count):
        some.mul_(sizes[: len(some)]).add_(source[: len(some)])
    return keys


def seed_of_layer(seed: int, index: int) -> int:
    """The same seed for every layer would give all of them the same noise."""
    return seed * 1_000_003 + index


def initial_router(keys: Tensor, num_experts: int) -> Tensor:
    """[N, d]: the mean key of each expert (MEFT, section 3.3), from keys [r, d] whose experts are consecutive rows."""
    return keys.view(num_experts, -1, keys.shape[1]).mean(1)
