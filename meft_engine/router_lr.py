"""Routers that learn at another rate than the group of parameters that they share with others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from meft_engine.adapter.attach import AttachedAdapters


def scale_router_steps(engine: Any, attached: AttachedAdapters, scale: float) -> list[RemovableHandle]:
    """Make every step of DeepSpeed's optimizer move the routers by ``scale`` times as much.

    An AdamW step, weight decay included, is proportional to the learning rate, so this is AdamW at ``scale`` times the
    group's rate, whatever sets that. Routers keep their place in the caller's groups: a group of their own would be
    unknown to a scheduler that was built before.

    Returns:
        The hooks, for removal.
    """
    routers = [adapter.router for adapter in attached.adapters.values() if adapter.router.requires_grad]
    before: list[Tensor] = []

    def remember(*_: Any) -> None:
        before[:] = [master.clone() for master in _masters(engine, routers)]

    @torch.no_grad()
    def correct(*_: Any) -> None:
        # ZeRO steps its groups one by one; a master that this call has not moved stays.
        for master, old in zip(_masters(engine, routers), before, strict=True):
            master.copy_(old + scale * (master - old))

    optimizer = engine.basic_optimizer
    return [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(correct)]


def _masters(engine: Any, routers: list[torch.nn.Parameter]) -> list[Tensor]:
    """Views of what the optimizer steps for each router: this rank's part of its fp32 master."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return [optimizer._get_fp32_opt_state_partition(router, release_swap_buffers=False)[0] for router in routers]
    if stage:
        # Of a router that lies on other ranks entirely, nothing is stepped here.
        return [r._hp_mapping.get_hp_fragment() for r in routers if r._hp_mapping is not None]
    if isinstance(optimizer, FP16_Optimizer):
        return [_in_flat(optimizer, router) for router in routers]
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        master_of = {id(h): m for halves, masters in pairs for h, m in zip(halves, masters, strict=True)}
        return [master_of[id(router)].data for router in routers]
    return [router.data for router in routers]


def _in_flat(optimizer: Any, router: torch.nn.Parameter) -> Tensor:
    """The router's part of the flat fp32 masters of its group."""
    for halves, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        start = 0
        for half in halves:
            if half is router:
                return flat.data[start : start + half.numel()]
            start += half.numel()
    raise KeyError("the router is in no group of the optimizer")
