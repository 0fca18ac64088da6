"""What is saved of an adapter besides its rows, what has to fit before one is loaded, and how it is put into a model.

Needs neither DeepSpeed nor an optimizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meft_engine.adapter.attach import DTYPES, AttachedAdapters, attach, unload_adapter
from meft_engine.checkpoint.catch_up import current_rows
from meft_engine.checkpoint.saved_adapter import (
    FORMAT,
    PEFT_TYPE,
    SavedAdapter,
    find_adapter,
    is_checkpoint,
    require_shapes,
)
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.zero_parameters import full_shape, gathered

if TYPE_CHECKING:
    from meft_engine.checkpoint.tensor_files import WrittenFile


def small_tensors(
    attached: AttachedAdapters, *, resumable: bool, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What there is of adapters besides rows, as copies on the host; under ZeRO stage 3 all ranks call it.

    ``<ffn>.router`` [N, d]; ``<ffn>.expert_bias`` [N], where experts are balanced by it; ``<ffn>.center`` [d], where
    inputs are centered; ``<ffn>.base_sample`` [64], to tell another base model. Names are those that FFNs have without
    PEFT's wrapper, so that an adapter fits the model with and without it.

    Args:
        resumable: to resume over the base that training began with; without, the samples are of the base as it is now.
        state_dict: of the model, from which routers are taken if it has them.
    """
    tensors, samples = {}, attached.base_samples if resumable else attached.present_samples()
    for full_name, adapter in attached.adapters.items():
        name = adapter.name
        router = (state_dict or {}).get(f"{full_name}.meft_adapter.router")
        with gathered([adapter.router] if router is None else []):
            router = (adapter.router if router is None else router).detach()
            tensors[f"{name}.router"] = router.to("cpu", copy=True).contiguous()
        if adapter.expert_bias is not None:
            tensors[f"{name}.expert_bias"] = adapter.expert_bias.to("cpu", copy=True)
        if adapter.center is not None:
            tensors[f"{name}.center"] = adapter.center.to("cpu", copy=True)
        tensors[f"{name}.base_sample"] = samples[full_name].contiguous()
    return tensors


def describe(
    attached: AttachedAdapters, dtype: torch.dtype | None = None, files: Mapping[str, WrittenFile] | None = None
) -> str:
    """What ``adapter_config.json`` says.

    Args:
        dtype: of stored rows; ``None``: that of the compute copies.
        files: of an adapter that travels alone, by their names; those of a checkpoint are in its manifest.
    """
    dtype = next(name for name, value in DTYPES.items() if value == (dtype or attached.compute_dtype))
    description = {
        "format": FORMAT,
        "peft_type": PEFT_TYPE,
        "compute_dtype": dtype,
        "ffns": [adapter.name for adapter in attached.adapters.values()],
        "base_quantized": attached.base_quantized,
        "meft": attached.config.resolved(),
    }
    if files is not None:
        description["files"] = {name: asdict(file) for name, file in files.items()}
    return json.dumps(description, indent=2) + "\n"


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a plain transformers model a saved adapter, for inference.

    Args:
        model: the base model that the adapter was trained on.
        folder: what ``engine.save_adapter`` wrote, or a checkpoint folder (its ``latest`` is taken).

    Returns:
        The same model; its forward and ``generate`` now include the adapter.

    Raises:
        FileNotFoundError: if a file is missing.
        MeftConfigError: if the adapter does not fit the model, or a file is not what was saved.
    """
    attach_saved(model, Path(folder))
    return model


def attach_saved(model: nn.Module, folder: Path) -> AttachedAdapters:
    """What :func:`load_adapter` does; gives the adapters. A model whose adapter is refused has none afterwards."""
    with SavedAdapter(find_adapter(folder)) as saved:
        saved.require_whole()
        config = MeftConfig.from_block(saved.description["meft"])
        compute_dtype = DTYPES[saved.description["compute_dtype"]]
        attached = attach(model, config, compute_dtype=compute_dtype, trainable=False)
        try:
            require_fit(attached, saved)
            if config.optimizer.mode == "dense_equivalent" and is_checkpoint(saved.folder):
                fill(attached, saved, functools.partial(current_rows, saved))
            else:
                fill(attached, saved, lambda ffn, kind, rows: saved.compute_rows(ffn, kind, rows).float())
        except BaseException:
            unload_adapter(model)
            raise
    return attached


def require_fit(attached: AttachedAdapters, saved: SavedAdapter) -> None:
    """Refuse an adapter of another shape or of another base model; reads shapes and samples alone.

    Raises:
        MeftConfigError: naming what differs.
    """
    folder, description = saved.folder, saved.description
    theirs, own = description["meft"]["adapter"], attached.config.resolved()["adapter"]
    for key in ("rows", "num_experts", "experts_per_token", "top_k", "gate", "center_inputs"):
        if theirs[key] != own[key]:
            raise MeftConfigError(f"{folder} was saved with adapter.{key} = {theirs[key]}, not {own[key]}")
    their_balance, own_balance = description["meft"]["router"]["balance"], attached.config.router.balance
    if (their_balance == "bias") != (own_balance == "bias"):
        raise MeftConfigError(
            f'{folder} was saved with router.balance = "{their_balance}", not "{own_balance}", and a bias is part of '
            "how experts are chosen"
        )
    names = [adapter.name for adapter in attached.adapters.values()]
    if description["ffns"] != names:
        raise MeftConfigError(
            f"{folder} adapts {len(description['ffns'])} FFNs ({description['ffns'][0]}, …), this model "
            f"{len(names)} ({names[0]}, …): it is of another model or other layers"
        )
    for adapter in attached.adapters.values():
        for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
            saved.require_table(adapter.name, kind, table.handle.shape)
    require_shapes(saved, _expected(attached), folder)
    quantized = description["base_quantized"] or attached.base_quantized
    for name, sample in attached.base_samples.items():
        other = saved.tensor(f"{attached.adapters[name].name}.base_sample")
        if other.shape != sample.shape or not _same_weights(other, sample, quantized):
            raise MeftConfigError(f"{folder} was trained on another base model: the weights of {name} differ")


def fill(attached: AttachedAdapters, saved: SavedAdapter, read: Callable[[str, str, slice], Tensor]) -> None:
    """Put a saved adapter, which :func:`require_fit` has accepted, into a model's adapters.

    Args:
        read: gives the masters [n, d] float32 of some rows of an FFN's ``keys`` or ``values``.
    """
    for adapter in attached.adapters.values():
        for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
            table.fill_by(functools.partial(read, adapter.name, kind))
        with gathered([adapter.router], modify=True), torch.no_grad():
            adapter.router.copy_(saved.tensor(f"{adapter.name}.router"))
        if adapter.expert_bias is not None:
            adapter.expert_bias.copy_(saved.tensor(f"{adapter.name}.expert_bias"))
        if adapter.center is not None:
            adapter.set_center(saved.tensor(f"{adapter.name}.center"))


def _expected(attached: AttachedAdapters) -> dict[str, torch.Size]:
    """The shapes of an adapter's tensors besides rows, by their names in a file."""
    return {
        f"{adapter.name}.{kind}": full_shape(tensor)
        for name, adapter in attached.adapters.items()
        for kind, tensor in (
            ("router", adapter.router),
            ("base_sample", attached.base_samples[name]),
            ("expert_bias", adapter.expert_bias),
            ("center", adapter.center),
        )
        if tensor is not None
    }


def _same_weights(one: Tensor, other: Tensor, quantized: bool) -> bool:
    """Whether two samples are of the same model, which may have been loaded in other precisions.

    Four bits move a weight by a tenth of its own size, where another model's have nothing to do with it.
    """
    if quantized:
        return bool(torch.cosine_similarity(one, other, dim=0) > 0.9)
    return torch.allclose(one, other, rtol=2**-7, atol=1e-6)
