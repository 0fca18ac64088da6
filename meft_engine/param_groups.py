"""What DeepSpeed's own optimizer gets to train: the caller's groups, less the frozen base, plus the routers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.config import MeftConfigError

_ADAM_FAMILY = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter, unless PEFT has already chosen what trains (its parameters and ``modules_to_save``)."""
    if getattr(model, "peft_config", None) is None:
        model.requires_grad_(False)


def as_groups(model: nn.Module, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """``model_parameters`` as ``deepspeed.initialize`` takes it, in the form of parameter groups."""
    given = list(model.parameters() if model_parameters is None else model_parameters)
    if given and isinstance(given[0], dict):
        return [{**group, "params": list(group["params"])} for group in given]
    return [{"params": given}]


def rebuild_groups(groups: list[dict[str, Any]], attached: AttachedAdapters) -> dict[str, int]:
    """Rebuild parameter groups in place, so that each holds what is trainable in it plus its layers' routers.

    A layer belongs to the group that holds its FFN (else to the first group). A group that would end up empty gets a
    one-element anchor whose gradient is zero: DeepSpeed would drop it, and schedulers that count groups would fail.

    Args:
        groups: the caller's groups, whose ``params`` are replaced.
        attached: the model's adapters.

    Returns:
        For each adapter's name, the index of its group (among groups that were not empty to begin with).
    """
    kept = [group for group in groups if group["params"]] or groups[:1]
    group_of = {id(p): index for index, group in enumerate(kept) for p in group["params"]}
    home = {}
    for name, ffn in attached.ffns.items():
        members = (group_of[id(p)] for p in ffn.entry.parameters() if id(p) in group_of)
        home[name] = next(members, 0)
    first = next(iter(attached.adapters.values()))
    all_routers = {id(adapter.router) for adapter in attached.adapters.values()}
    for index, group in enumerate(kept):
        # `model.parameters()`, read after the adapters were attached, names the routers too.
        others = [p for p in group["params"] if id(p) not in all_routers]
        routers = [a.router for name, a in attached.adapters.items() if home[name] == index]
        group["params"] = [p for p in [*others, *routers] if p.requires_grad] or [first.add_anchor()]
    return home


def require_adam(optimizer: torch.optim.Optimizer) -> None:
    """Rows are updated by AdamW with the settings of the user's optimizer, so that must be AdamW's kin.

    Raises:
        MeftConfigError: if it is another optimizer, or a variant of Adam that the rows would not follow.
    """
    kind = type(optimizer).__name__
    if not _ADAM_FAMILY & {base.__name__ for base in type(optimizer).__mro__}:
        raise MeftConfigError(
            f"optimizer {kind} is not of Adam's family, so the adapter's rows could not follow it; use AdamW"
        )
    decoupled = "AdamW" in kind or getattr(optimizer, "adam_w_mode", False)
    for group in optimizer.param_groups:
        coupled = not (decoupled or group.get("decoupled_weight_decay") or group.get("adam_w_mode", False))
        if group.get("weight_decay", 0) and coupled:
            raise MeftConfigError(
                f"optimizer {kind} with weight_decay = {group['weight_decay']} adds the decay to the gradient, which "
                "rows updated only when touched cannot follow; use AdamW"
            )
        for option, supported in (("amsgrad", False), ("maximize", False), ("bias_correction", True)):
            if bool(group.get(option, supported)) != supported:
                raise MeftConfigError(f"optimizer option {option} = {group[option]} is not supported for rows")


def require_adam_name(name: str | None, settings: dict[str, Any] | None = None) -> None:
    """The same for the ``optimizer`` of a DeepSpeed JSON (its ``type`` and ``params``), before anything is allocated.

    Raises:
        MeftConfigError: if there is no optimizer, or one that the rows would not follow.
    """
    if name is None:
        raise MeftConfigError(
            'no optimizer: name one in the configuration ("optimizer": {"type": "AdamW", …}) or pass one'
        )
    if name.lower() not in {"adam", "adamw"}:
        raise MeftConfigError(
            f'optimizer.type = "{name}" is not of Adam\'s family, so the rows could not follow it; use "AdamW"'
        )
    settings = settings or {}
    if name.lower() == "adam" and not settings.get("adam_w_mode", True) and settings.get("weight_decay", 0):
        raise MeftConfigError(
            f"optimizer.params.adam_w_mode = false with weight_decay = {settings['weight_decay']} adds the decay to "
            'the gradient, which rows updated only when touched cannot follow; use "AdamW"'
        )


def undo_construction_step(optimizer: object) -> None:
    """Undo the Adam step with zero gradients that DeepSpeed's 16-bit optimizers of stage 0 take when they are built.

    It decays the fp32 routers and advances their step count, which no other stage does, so that stages would differ.
    Other optimizers are left alone.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_Optimizer):
        pairs = list(zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True))
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        pairs = [pair for halves, masters in groups for pair in zip(halves, masters, strict=True)]
    else:
        return
    for half, master in pairs:
        master.data.copy_(half.data)
        optimizer.optimizer.state.pop(master, None)
