"""The nearest settings that fit, where those that were asked for do not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meft_engine.config import MeftConfigError
from meft_engine.planner.plan import Plan
from meft_engine.planner.rows import router_parameters

Config = dict[str, Any]
PlanOf = Callable[[Config, bool], Plan]
"""Of a configuration, and whether the base's layers are computed again in the backward."""

_SLOTS_OF_LAYER_SHARE = 4  # of a layer's active rows, all layers' slots together are given no less than this part


@dataclass(frozen=True)
class Fitted:
    """What fits."""

    config: Config
    """The whole configuration."""
    gradient_checkpointing: bool
    changes: tuple[str, ...]
    """What differs from what was asked for, in the order of what costs least; empty: nothing does."""
    plan: Plan


def fit(config: Mapping[str, Any], plan_of: PlanOf, *, gradient_checkpointing: bool = False) -> Fitted | None:
    """The configuration with as few changes as make it fit, cheapest first; ``None`` where nothing does.

    What costs neither time nor quality comes first, then what costs time, then precision of keys and moments, and last
    of all rows.

    Args:
        plan_of: plans a configuration for the machine in question.
    """
    now, checkpointing = copy.deepcopy(dict(config)), gradient_checkpointing
    plan, changes = plan_of(now, checkpointing), []
    for change in _changes():
        if plan.fits:
            break
        tried, with_checkpointing = copy.deepcopy(now), checkpointing
        said = change.make(tried, plan)
        if said is None:
            continue
        if change.checkpointing:
            with_checkpointing = True
        try:
            found = plan_of(tried, with_checkpointing)
        except MeftConfigError:
            continue  # not together with what else is asked for
        if _missing(found, change.helps) < _missing(plan, change.helps):
            now, checkpointing, plan = tried, with_checkpointing, found
            # Of the same field only the last change is one.
            changes = [*(one for one in changes if one.split(" ")[0] != said.split(" ")[0]), said]
    if not plan.fits:
        fewer = _fewer_rows(now, plan, lambda tried: plan_of(tried, checkpointing))
        if fewer is None:
            return None
        now, plan, said = fewer
        changes.append(said)
    return Fitted(now, checkpointing, tuple(changes), plan)


def with_nearest(plan: Plan, fitted: Fitted | None) -> Plan:
    """The plan with what would make it fit."""
    return plan if plan.fits else replace(plan, nearest=fitted.changes if fitted is not None else ())


@dataclass(frozen=True)
class _Change:
    helps: str
    """``"host"`` or ``"device"``."""
    make: Callable[[Config, Plan], str | None]
    """Changes a configuration and says how; ``None``: there is nothing to change."""
    checkpointing: bool = False


def _missing(plan: Plan, place: str) -> int:
    """Bytes that are missing there; 0 where it fits."""
    if place == "host":
        return max(0, plan.host_peak - plan.host_limit.bytes)
    return max(0, sum(plan.device.values()) - plan.device_limit.bytes) if plan.device_limit is not None else 0


def _changes() -> Iterator[_Change]:
    yield _Change("device", _smaller_buckets)
    yield _Change("host", _no_async_save)
    yield _Change("device", _checkpointing, checkpointing=True)
    yield _Change("host", _checkpointing_of_cpu, checkpointing=True)
    for _ in range(8):
        yield _Change("device", _smaller_micro_batch)
    yield _Change("device", _stage_3)
    yield _Change("device", _fewer_slots)
    yield _Change("host", _set("optimizer", "moments_dtype", "bf16"))
    yield _Change("device", _set("offload", "keys_dtype", "int8"))
    yield _Change("device", _keys_on_host)
    for _ in range(8):
        yield _Change("host", _smaller_micro_batch)


def _smaller_buckets(config: Config, plan: Plan) -> str | None:
    """ZeRO's buffer for gradients is by default for 500 M elements, of which routers have few."""
    run = plan.settings
    if not run.bucket_bytes or not run.block.adapter.freeze_base:
        return None
    widths = plan.model.adapted(run.block.adapter)
    elements = max(1_000_000, router_parameters(run.block, len(widths), max(widths)))
    zero = _section(config, "zero_optimization")
    if elements >= (zero.get("reduce_bucket_size") if isinstance(zero.get("reduce_bucket_size"), int) else 500_000_000):
        return None
    zero["reduce_bucket_size"] = elements
    return f"zero_optimization.reduce_bucket_size = {elements}"


def _no_async_save(config: Config, plan: Plan) -> str | None:
    if not plan.settings.block.checkpoint.async_save:
        return None
    _section(config, "meft", "checkpoint")["async_save"] = False
    return "checkpoint.async_save = false"


def _checkpointing(config: Config, plan: Plan) -> str | None:
    return None if plan.settings.gradient_checkpointing else "gradient checkpointing (--gradient_checkpointing)"


def _checkpointing_of_cpu(config: Config, plan: Plan) -> str | None:
    return _checkpointing(config, plan) if plan.device_type == "cpu" else None


def _smaller_micro_batch(config: Config, plan: Plan) -> str | None:
    """Half as many sequences, twice as often: steps are of as many sequences as before."""
    run = plan.settings
    if run.micro_batch == 1:
        return None
    halves = run.micro_batch % 2 == 0
    micro = run.micro_batch // 2 if halves else 1
    steps = run.accumulation * (2 if halves else run.micro_batch)
    config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = micro, steps
    if config.get("train_batch_size") not in (None, "auto"):
        config["train_batch_size"] = micro * steps * run.ranks
    return f"train_micro_batch_size_per_gpu = {micro} with gradient_accumulation_steps = {steps}"


def _stage_3(config: Config, plan: Plan) -> str | None:
    if plan.settings.stage == 3 or plan.settings.ranks == 1:
        return None
    _section(config, "zero_optimization").update(stage=3, stage3_max_live_parameters=plan.model.largest_module * 2)
    return "zero_optimization.stage = 3"


def _fewer_slots(config: Config, plan: Plan) -> str | None:
    missing, taken = _missing(plan, "device"), plan.device.get("slots", 0)
    least = taken // (_SLOTS_OF_LAYER_SHARE * max(1, len(plan.model.adapted(plan.settings.block.adapter))))
    if plan.settings.block.offload.slot_bytes is not None or taken == 0:
        return None
    budget = max(least, taken - missing - taken // 10)
    _section(config, "meft", "offload")["slot_bytes"] = budget
    return f"offload.slot_bytes = {budget}"


def _keys_on_host(config: Config, plan: Plan) -> str | None:
    offload = _section(config, "meft", "offload")
    if offload.get("keys") == "host" or plan.settings.block.offload.resident_bytes:
        return None
    offload.pop("keys_dtype", None)
    offload["keys"] = "host"
    return 'offload.keys = "host"'


def _set(section: str, name: str, value: str) -> Callable[[Config, Plan], str | None]:
    def make(config: Config, plan: Plan) -> str | None:
        if getattr(getattr(plan.settings.block, section), name) == value:
            return None
        _section(config, "meft", section)[name] = value
        return f'{section}.{name} = "{value}"'

    return make


def _fewer_rows(config: Config, plan: Plan, plan_of: Callable[[Config], Plan]) -> tuple[Config, Plan, str] | None:
    """As many rows as fit, in multiples of what the block's experts ask for."""
    adapter = plan.settings.block.adapter
    step = adapter.num_experts or max(1, min(256, adapter.rows // 8))

    def tried(count: int) -> tuple[Config, Plan] | None:
        changed = copy.deepcopy(config)
        _section(changed, "meft", "adapter")["rows"] = count * step
        cap = _section(changed, "meft", "active_rows")
        if (cap.get("cap") or 0) > count * step:
            cap["cap"] = count * step
        try:
            found = plan_of(changed)
        except MeftConfigError:
            return None  # too few rows for so many picks or experts
        return (changed, found) if found.fits else None

    low, high, best = 0, (adapter.rows - 1) // step, None
    while low < high:
        middle = (low + high + 1) // 2
        found = tried(middle)
        low, high, best = (middle, high, found) if found is not None else (low, middle - 1, best)
    return None if best is None else (*best, f"adapter.rows = {low * step}")


def _section(config: Config, *path: str) -> Config:
    for name in path:
        config = config.setdefault(name, {})
    return config


def written(config: Mapping[str, Any]) -> str:
    """The text of a configuration's file."""
    return json.dumps(config, indent=2) + "\n"
