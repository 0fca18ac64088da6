"""The adapter alone, as two files that travel: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading them needs neither DeepSpeed nor an optimizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meft_engine.adapter.attach import DTYPES, AttachedAdapters
from meft_engine.checkpoint import rank_files
from meft_engine.config import MeftConfigError
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.zero_parameters import full_shape, gathered
from meft_kernels import planes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SUBFOLDER = "meft"
"""Where the files are, in a folder that holds more than the adapter."""
PEFT_TYPE = "MEFT"
_FORMAT = 4


def save_adapter(
    attached: AttachedAdapters,
    folder: Path,
    *,
    resumable: bool = False,
    write: bool = True,
    read: Callable[[PartiallyOffloadedTensor], Tensor] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter to ``folder``.

    Tensors: ``<ffn>.keys`` and ``<ffn>.values`` [r, d], in the compute copy's precision; ``<ffn>.router`` [N, d];
    ``<ffn>.expert_bias`` [N], where experts are balanced by it; ``<ffn>.center`` [d], where inputs are centered;
    ``<ffn>.base_sample`` [64], to tell another base model. Names are those that FFNs have without PEFT's wrapper, so
    that an adapter fits the model with and without it.

    Args:
        resumable: to resume over the base that training began with; without, the samples are of the base as it is now.
        write: ``False`` where another rank writes: under ZeRO stage 3 all ranks bring the routers together.
        read: gives a table's compute copy, where what is stored may not be up to date.
        state_dict: of the model, from which routers are taken if it has them.
    """
    tensors, samples = {}, attached.base_samples if resumable else attached.present_samples()
    for full_name, adapter in attached.adapters.items():
        name = adapter.name
        for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
            if write:
                tensors[f"{name}.{kind}"] = read(table) if read is not None else table.planes()[0]
        router = (state_dict or {}).get(f"{full_name}.meft_adapter.router")
        with gathered([adapter.router] if router is None else []):
            router = (adapter.router if router is None else router).detach()
            tensors[f"{name}.router"] = router.to("cpu", copy=True).contiguous()
        if adapter.expert_bias is not None:
            tensors[f"{name}.expert_bias"] = adapter.expert_bias.to("cpu", copy=True)
        if adapter.center is not None:
            tensors[f"{name}.center"] = adapter.center.to("cpu", copy=True)
        tensors[f"{name}.base_sample"] = samples[full_name].contiguous()
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    dtype = next(name for name, value in DTYPES.items() if value == attached.compute_dtype)
    description = {
        "format": _FORMAT,
        "peft_type": PEFT_TYPE,
        **attached.peft_keys,
        "compute_dtype": dtype,
        "ffns": [adapter.name for adapter in attached.adapters.values()],
        "base_quantized": attached.base_quantized,
        "meft": attached.config.resolved(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def require_files(folder: Path, *names: str) -> None:
    """Check that files are there.

    Raises:
        FileNotFoundError: naming the first that is missing.
    """
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, so nothing can be loaded from {folder}")


def read_description(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        MeftConfigError: if it is of a format that this version does not read.
    """
    description = json.loads((folder / CONFIG_FILE).read_text())
    if description.get("format") != _FORMAT:
        raise MeftConfigError(
            f"{folder / CONFIG_FILE} has format = {description.get('format')!r}, and this version reads {_FORMAT}; "
            "load it with the version of meft_engine that wrote it"
        )
    return description


def require_fit(attached: AttachedAdapters, folder: Path) -> None:
    """Refuse an adapter of another shape or of another base model; reads shapes and samples alone.

    Raises:
        MeftConfigError: naming what differs.
    """
    description = read_description(folder)
    saved, own = description["meft"]["adapter"], attached.config.resolved()["adapter"]
    for key in ("rows", "num_experts", "experts_per_token", "top_k", "gate", "center_inputs"):
        if saved[key] != own[key]:
            raise MeftConfigError(f"{folder} was saved with adapter.{key} = {saved[key]}, not {own[key]}")
    saved_balance, own_balance = description["meft"]["router"]["balance"], attached.config.router.balance
    if (saved_balance == "bias") != (own_balance == "bias"):
        raise MeftConfigError(
            f'{folder} was saved with router.balance = "{saved_balance}", not "{own_balance}", and a bias is part of '
            "how experts are chosen"
        )
    names = [adapter.name for adapter in attached.adapters.values()]
    if description["ffns"] != names:
        raise MeftConfigError(
            f"{folder} adapts {len(description['ffns'])} FFNs ({description['ffns'][0]}, …), this model "
            f"{len(names)} ({names[0]}, …): it is of another model or other layers"
        )
    quantized = description["base_quantized"] or attached.base_quantized
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        require_shapes(file, _expected(attached), folder / WEIGHTS_FILE)
        for name, sample in attached.base_samples.items():
            other = file.get_tensor(f"{attached.adapters[name].name}.base_sample")
            if other.shape != sample.shape or not _same_weights(other, sample, quantized):
                raise MeftConfigError(f"{folder} was trained on another base model: the weights of {name} differ")


def require_shapes(file: Any, expected: dict[str, Sequence[int]], path: Path) -> None:
    """Check the tensors of an open safetensors file against the shapes of those that they are to be copied into.

    Raises:
        MeftConfigError: naming the first that is missing or of another shape.
    """
    names = set(file.keys())
    for name, needed in expected.items():
        shape = tuple(file.get_slice(name).get_shape()) if name in names else None
        if shape != tuple(needed):
            found = "is missing" if shape is None else f"has shape {shape}"
            raise MeftConfigError(f"{path}: {name} {found}, where {tuple(needed)} is needed")


def fill(attached: AttachedAdapters, folder: Path, ranks: rank_files.RankFiles | None = None) -> None:
    """Put saved tensors, which :func:`require_fit` has accepted, into a model's adapters.

    Args:
        ranks: what has the lower planes of masters; without, masters are what compute copies hold.
    """
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        for adapter in attached.adapters.values():
            for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
                table.fill_by(functools.partial(_masters, file, f"{adapter.name}.{kind}", ranks, table.name))
            with gathered([adapter.router], modify=True), torch.no_grad():
                adapter.router.copy_(file.get_tensor(f"{adapter.name}.router"))
            if adapter.expert_bias is not None:
                adapter.expert_bias.copy_(file.get_tensor(f"{adapter.name}.expert_bias"))
            if adapter.center is not None:
                adapter.set_center(file.get_tensor(f"{adapter.name}.center"))


def _masters(file: Any, name: str, ranks: rank_files.RankFiles | None, table: str, rows: slice) -> Tensor:
    """[n, d] float32: consecutive masters of a table in an open file."""
    compute = file.get_slice(name)[rows]
    if ranks is None or not ranks.has(f"{table}/low"):
        return compute.float()
    return planes.join(compute.contiguous(), ranks.read(table, "low", rows))


def _expected(attached: AttachedAdapters) -> dict[str, Sequence[int]]:
    """The shapes of the tensors of an adapter's file, by their names there."""
    return {
        f"{adapter.name}.{kind}": full_shape(tensor)
        for name, adapter in attached.adapters.items()
        for kind, tensor in (
            ("keys", adapter.keys.handle),
            ("values", adapter.values.handle),
            ("router", adapter.router),
            ("base_sample", attached.base_samples[name]),
            ("expert_bias", adapter.expert_bias),
            ("center", adapter.center),
        )
        if tensor is not None
    }


def resolve_folder(folder: Path) -> Path:
    """The folder with the adapter's files: itself, the one in it, or that of the latest checkpoint."""
    config = folder / CONFIG_FILE
    # A LoRA's file has the same name.
    if config.is_file() and json.loads(config.read_text()).get("peft_type") == PEFT_TYPE:
        return folder
    if (folder / SUBFOLDER).is_dir():
        return folder / SUBFOLDER
    latest = folder / "latest"
    return folder / latest.read_text().strip() / SUBFOLDER if latest.is_file() else folder


def _same_weights(one: Tensor, other: Tensor, quantized: bool) -> bool:
    """Whether two samples are of the same model, which may have been loaded in other precisions.

    Four bits move a weight by a tenth of its own size, where another model's have nothing to do with it.
    """
    if quantized:
        return bool(torch.cosine_similarity(one, other, dim=0) > 0.9)
    return torch.allclose(one, other, rtol=2**-7, atol=1e-6)
