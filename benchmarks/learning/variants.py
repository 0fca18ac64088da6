"""What is tried that no configuration offers: changes to an engine between its construction and its first step.

* ``key_noise``: how much of it there is in the keys, in place of twice the FFN's row; they stay as large.
* ``key_order: "alike"``: rows are sorted by balanced k-means, so that the keys of an expert are alike; ``"random"``.
* ``router_init: "random"``: Gaussian routers of the same size, in place of the mean keys of their experts.
* ``router_scale``: routers start so many times as large: the inverse of a temperature.
* ``pick_dropout``: share of a token's picks that are dropped in training; the others weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import meft_engine
from meft_engine.adapter.initialize import NOISE, initial_keys, initial_router, seed_of_layer
from meft_engine.adapter.module import SparseAdapter

_ROUNDS = 20


def apply(variant: Mapping[str, Any], engine: meft_engine.MeftEngine, seed: int) -> None:
    """Change an engine that has not made a step yet.

    Raises:
        ValueError: for a variant that is not known.
    """
    for name, value in variant.items():
        if name not in _VARIANTS:
            raise ValueError(f"variant {name!r} is none of {', '.join(_VARIANTS)}")
        for index, adapter in enumerate(engine.meft_adapters.adapters.values()):
            _VARIANTS[name](engine, adapter, value, torch.Generator().manual_seed(seed_of_layer(seed, index)))


@torch.no_grad()
def _noise_keys(
    engine: meft_engine.MeftEngine, adapter: SparseAdapter, noise: float, generator: torch.Generator
) -> None:
    ffn = next(ffn for ffn in engine.meft_adapters.ffns.values() if ffn.module.meft_adapter is adapter)
    keys = initial_keys(ffn.gate_weight, adapter.keys.rows, "ffn", generator.initial_seed(), noise)
    keys *= ((1 + NOISE**2) / (1 + noise**2)) ** 0.5
    adapter.keys.fill(keys)
    adapter.router.copy_(initial_router(keys, adapter.router.shape[0]))


@torch.no_grad()
def _order_keys(engine: meft_engine.MeftEngine, adapter: SparseAdapter, kind: str, generator: torch.Generator) -> None:
    keys, experts = adapter.keys.master, adapter.router.shape[0]
    order = alike(keys, experts, generator) if kind == "alike" else torch.randperm(len(keys), generator=generator)
    adapter.keys.fill(keys[order])
    adapter.router.copy_(initial_router(keys[order], experts))


@torch.no_grad()
def _init_router(engine: meft_engine.MeftEngine, adapter: SparseAdapter, kind: str, generator: torch.Generator) -> None:
    noise = torch.randn(adapter.router.shape, generator=generator)
    adapter.router.copy_(noise * adapter.router.square().mean().sqrt())


@torch.no_grad()
def _scale_router(
    engine: meft_engine.MeftEngine, adapter: SparseAdapter, scale: float, generator: torch.Generator
) -> None:
    adapter.router.mul_(scale)


def _drop_picks(
    engine: meft_engine.MeftEngine, adapter: SparseAdapter, share: float, generator: torch.Generator
) -> None:
    plain = adapter._select

    def select(*args: Any) -> tuple[Any, Tensor]:
        selection, scores = plain(*args)
        if not (adapter.training and torch.is_grad_enabled()):
            return selection, scores
        kept = selection.valid & (torch.rand(selection.valid.shape, generator=generator) >= share)
        picks, slots = (torch.where(kept, part, 0) for part in (selection.picks, selection.slots))
        return replace(selection, valid=kept, picks=picks, slots=slots), torch.where(kept, scores, 0) / (1 - share)

    adapter._select = select


_VARIANTS: dict[str, Callable[..., None]] = {
    "key_noise": _noise_keys,
    "key_order": _order_keys,
    "router_init": _init_router,
    "router_scale": _scale_router,
    "pick_dropout": _drop_picks,
}


def alike(keys: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """[r] an order of keys [r, d] in which each group of r / groups consecutive ones points in similar directions.

    Spherical k-means with groups of equal size: keys choose in the order of how much their choice matters to them.
    """
    directions = F.normalize(keys, dim=1)
    size = len(keys) // groups
    centers = directions[torch.randperm(len(keys), generator=generator)[:groups]]
    for _ in range(_ROUNDS):
        similarity = directions @ centers.T
        best, second = similarity.topk(min(2, groups), dim=1).values[:, [0, -1]].T
        preferred = similarity.argsort(dim=1, descending=True).tolist()
        group, room = [0] * len(keys), [size] * groups
        for key in (best - second).argsort(descending=True).tolist():
            group[key] = next(choice for choice in preferred[key] if room[choice])
            room[group[key]] -= 1
        order = torch.tensor(group).argsort(stable=True)
        centers = F.normalize(directions[order].view(groups, size, -1).mean(1), dim=1)
    return order
