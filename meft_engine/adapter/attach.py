"""Attach sparse adapters to a model: the base's modules and state-dict names stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meft_engine.adapter.calls import CallTracker
from meft_engine.adapter.discover import FFN, find_ffns
from meft_engine.adapter.initialize import initial_keys, initial_router, seed_of_layer
from meft_engine.adapter.module import SparseAdapter, listen
from meft_engine.adapter.named import attribute_of, require_free, switches, take_off
from meft_engine.adapter.peft_keys import peft_keys
from meft_engine.adapter.switch import DEFAULT_NAME, Switch
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.cores import rank_cores
from meft_engine.offload.gradient_slots import GradientSlots
from meft_engine.offload.hot_rows import HotRows
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from meft_engine.parallel.ranks import Ranks
from meft_engine.parallel.sharding import Sharding, TablePlan
from meft_engine.planner import (
    device_bytes_needed,
    gradient_slots_of_layer,
    host_bytes_needed,
    hot_rows_of_layer,
    require_device_memory,
    require_host_memory,
    snapshot_bytes_needed,
)
from meft_engine.zero_parameters import full_shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class AttachedAdapters:
    """The adapters of a model, by the names of their FFNs in it."""

    config: MeftConfig
    compute_dtype: torch.dtype
    adapters: dict[str, SparseAdapter]
    ffns: dict[str, FFN]
    base_parameters: int
    """Elements of the base model."""
    base_samples: dict[str, Tensor]
    """A sample of each FFN's gate weights, by which another base model is told apart."""
    peft_keys: dict[str, Any]
    """What PEFT is to know of the base model, wherever the adapter is saved."""
    traffic: list[Traffic] = field(default_factory=list)
    """Of every device that rows visit."""
    base_quantized: bool = False
    """Whether weights of an adapted FFN are kept in fewer bits than they were trained in."""
    measured_bytes: int = 0
    """How much the process's resident memory grew while the rows and their optimizer state were allocated."""

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add what the process's resident memory grows by inside the ``with`` to ``measured_bytes``."""
        before = _anonymous_memory()
        yield
        self.measured_bytes += _anonymous_memory() - before

    def present_samples(self) -> dict[str, Tensor]:
        """``base_samples`` of what FFNs are now, which differs where the base trains too."""
        if self.config.adapter.freeze_base:
            return self.base_samples
        return {name: base_sample(ffn.gate_weight) for name, ffn in self.ffns.items()}

    def close(self) -> None:
        """End what goes to and from devices; rows are of no use afterwards."""
        for traffic in self.traffic:
            traffic.gradients.close()

    def tables(self) -> list[PartiallyOffloadedTensor]:
        """Every adapter's keys, then its values, first layer first."""
        return [table for adapter in self.adapters.values() for table in (adapter.keys, adapter.values)]

    def hot_rows(self) -> list[HotRows]:
        """Of every layer whose device may own rows."""
        return [adapter.keys.hot for adapter in self.adapters.values() if adapter.keys.hot is not None]


def attach(
    model: nn.Module,
    config: MeftConfig,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | str | None = None,
    trainable: bool = True,
    ranks: Ranks | None = None,
    name: str = DEFAULT_NAME,
    values_on_device: bool = False,
    base_to_come: int = 0,
) -> AttachedAdapters:
    """Give every FFN that the configuration names an adapter, initialised from the seed.

    Whatever is raised, the model is left as it was. For inference it may have other adapters; the new one acts if it is
    the first.

    Args:
        model: a transformer whose FFNs :func:`find_ffns` recognises.
        config: the block. compute_dtype: of the rows' compute copies.
        device: where the model computes; ``None``: where its FFNs are now.
        trainable: ``False`` for inference (no gradients are kept).
        ranks: those that train together; ``None``: this process alone.
        name: tells it from other adapters of the model.
        values_on_device: keep the values' compute copies on the device too, as the keys' always are.
        base_to_come: bytes of the base that will be on the device and are not there yet.

    Raises:
        MeftConfigError: if no FFN fits, the name is taken, host or device memory is too small, or, where ``trainable``,
            the model has adapters already.
    """
    others = switches(model)
    if trainable and others:
        raise MeftConfigError(f"this {type(model).__name__} already has MEFT adapters; attach to a fresh model")
    require_free(model, name)
    ffns = find_ffns(model, config.adapter)
    ranks = ranks or Ranks()
    needed = sum(
        host_bytes_needed(
            config,
            1,
            ffn.width,
            compute_dtype=compute_dtype,
            trainable=trainable,
            ranks=ranks.size,
            ranks_of_node=len(ranks.node),
        )
        for ffn in ffns
    )
    copies = snapshot_bytes_needed(config, needed, len(ranks.node)) if trainable else 0
    require_host_memory(needed, config, len(ffns), copies=copies)
    if trainable:
        place = device if device is not None else ffns[0].gate_weight.device
        on_device = device_bytes_needed(config, len(ffns), max(f.width for f in ffns), 1, compute_dtype=compute_dtype)
        require_device_memory({"base": base_to_come, **on_device}, config, len(ffns), place)
    sharding = _shard(ffns, config, compute_dtype, device, ranks) if ranks.size > 1 else None

    base_parameters = sum(math.prod(full_shape(p)) for p in model.parameters())
    attached = AttachedAdapters(config, compute_dtype, {}, {}, base_parameters, {}, peft_keys(model, config.adapter))
    traffic: dict[torch.device, Traffic | None] = {}
    switch = Switch(name, selected=not others, enabled=all(other.enabled for other in others))
    trackers = {stack: CallTracker(model.get_submodule(stack), switch) for stack in {ffn.stack for ffn in ffns}}
    try:
        for index, ffn in enumerate(ffns):
            gate_weight = ffn.gate_weight
            place = torch.device(device) if device is not None else gate_weight.device
            if place not in traffic:
                traffic[place] = Traffic.of(place, config.offload)
                attached.traffic += [traffic[place]] if traffic[place] is not None else []
            with attached.measured():
                tables = [
                    PartiallyOffloadedTensor(
                        f"{ffn.portable_name}/{kind}",
                        config.adapter.rows,
                        ffn.width,
                        device=place,
                        compute_dtype=compute_dtype,
                        resident=(config.offload.keys == "device") if kind == "keys" else values_on_device,
                        resident_dtype=torch.int8 if (kind, config.offload.keys_dtype) == ("keys", "int8") else None,
                        read_whole=kind == "keys",
                        trainable=trainable,
                        max_staleness=config.optimizer.max_staleness,
                        pin_memory=config.offload.pin_memory,
                        huge_pages=config.offload.huge_pages,
                        threads=len(rank_cores()),
                        shard=sharding.shard(2 * index + at) if sharding is not None else None,
                        traffic=traffic[place].of_keys() if kind == "keys" and traffic[place] else traffic[place],
                    )
                    for at, kind in enumerate(("keys", "values"))
                ]
            seed = seed_of_layer(config.adapter.seed, index)
            keys = initial_keys(gate_weight, config.adapter.rows, config.adapter.init_keys, seed)
            tables[0].fill(keys)
            router = initial_router(keys, config.adapter.resolved_num_experts)
            router = router.to(gate_weight.device, gate_weight.dtype)
            slots = _gradient_slots(config, tables, len(ffns)) if trainable and traffic[place] is not None else None
            adapter = SparseAdapter(
                ffn.portable_name, config, router, *tables, trackers[ffn.stack], ranks, switch, slots
            )
            adapter.train(ffn.module.training)
            ffn.module.add_module(attribute_of(name), adapter)
            adapter.hooks += [*listen(adapter, ffn.entry, ffn.exit), *trackers[ffn.stack].hooks]
            attached.adapters[ffn.name], attached.ffns[ffn.name] = adapter, ffn
            attached.base_samples[ffn.name] = base_sample(gate_weight)
            attached.base_quantized |= not all(p.is_floating_point() for p in ffn.entry.parameters())
    except BaseException:
        take_off(model, [switch])
        for tracker in trackers.values():
            for hook in tracker.hooks:
                hook.remove()
        raise
    embedding_hooks = _let_embeddings_require_grad(model) if trainable else []
    for adapter in attached.adapters.values():
        adapter.hooks += embedding_hooks
    return attached


def _shard(
    ffns: Sequence[FFN], config: MeftConfig, compute_dtype: torch.dtype, device: torch.device | str | None, ranks: Ranks
) -> Sharding:
    """Keys' and values' tables of every FFN, in the order in which they are built."""
    shape = config.adapter
    plans = [
        TablePlan(
            rows=shape.rows,
            expert_rows=shape.rows // shape.resolved_num_experts,
            width=ffn.width,
            on_device=torch.device(device or ffn.gate_weight.device).type != "cpu",
        )
        for ffn in ffns
        for _ in ("keys", "values")
    ]
    return Sharding(
        ranks,
        plans,
        compute_dtype=compute_dtype,
        moments_dtype=DTYPES[config.optimizer.moments_dtype],
        # Readers bring idle rows to date themselves, for which they need all that an update needs.
        shares_state=config.optimizer.mode == "dense_equivalent",
        pin_memory=config.offload.pin_memory,
        huge_pages=config.offload.huge_pages,
    )


def _gradient_slots(
    config: MeftConfig, tables: Sequence[PartiallyOffloadedTensor], layers: int
) -> GradientSlots | None:
    """A layer's share of ``offload.grad_slot_bytes`` and ``resident_bytes``; ``None`` where both hold no row."""
    slots = gradient_slots_of_layer(config, layers, tables[0].width)
    most = hot_rows_of_layer(config, layers, tables[0].width)
    hot = HotRows(*tables, most, DTYPES[config.optimizer.moments_dtype]) if most else None
    return GradientSlots(*tables, slots, hot) if slots or hot else None


def _anonymous_memory() -> int:
    """Resident bytes of this process that no file backs (weights that are mapped from a file come and go)."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def base_sample(gate_weight: Tensor) -> Tensor:
    """[64] float32: evenly spaced elements of a gate projection, enough to tell base models apart."""
    flat = gate_weight.detach().flatten()
    return flat[:: max(1, flat.numel() // 64)][:64].float().cpu()


def _let_embeddings_require_grad(model: nn.Module) -> list[RemovableHandle]:
    """Over a frozen base no input of the first layer requires grad, and reentrant checkpointing would then build no
    graph for it, in silence. transformers' ``enable_input_require_grads`` does the same for PEFT."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return [embeddings.register_forward_hook(_require_grad)] if embeddings is not None else []


def _require_grad(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    needed = module.training and torch.is_grad_enabled() and not output.requires_grad
    return output.detach().requires_grad_() if needed else output
