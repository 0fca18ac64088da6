"""The adapter alone, as two files that travel: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading them needs neither DeepSpeed nor an optimizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meft_engine.adapter.attach import DTYPES, AttachedAdapters, attach
from meft_engine.config import MeftConfig, MeftConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FORMAT = 1


def save_adapter(attached: AttachedAdapters, folder: Path, *, masters: bool = False) -> None:
    """Write the adapter to ``folder``.

    Tensors: ``<ffn>.keys`` and ``<ffn>.values`` [r, d], in the compute copy's precision, or as fp32 masters;
    ``<ffn>.router`` [N, d]; ``<ffn>.base_sample`` [64], to tell another base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, adapter in attached.adapters.items():
        for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
            rows = table.master if masters else table.master.to(attached.compute_dtype)
            tensors[f"{name}.{kind}"] = rows
        tensors[f"{name}.router"] = adapter.router.detach().cpu().contiguous()
        tensors[f"{name}.base_sample"] = attached.base_samples[name]
    save_file(tensors, folder / WEIGHTS_FILE)
    dtype = next(name for name, value in DTYPES.items() if value == attached.compute_dtype)
    description = {
        "format": _FORMAT,
        "peft_type": "MEFT",
        "compute_dtype": dtype,
        "ffns": list(attached.adapters),
        "meft": attached.config.resolved(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a plain transformers model a saved adapter, for inference.

    Args:
        model: the base model that the adapter was trained on.
        folder: what ``engine.save_adapter`` wrote, or a checkpoint folder (its ``latest`` is taken).

    Returns:
        The same model; its forward and ``generate`` now include the adapter.

    Raises:
        FileNotFoundError: if a file is missing.
        MeftConfigError: if the adapter does not fit the model.
    """
    folder = _resolve(Path(folder))
    description, tensors = read_adapter(folder)
    config = MeftConfig.from_block(description["meft"])
    attached = attach(model, config, compute_dtype=DTYPES[description["compute_dtype"]], trainable=False)
    fill(attached, description, tensors, folder)
    return model


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved adapter.

    Raises:
        FileNotFoundError: naming the file that is missing.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; {folder} is not a whole MEFT adapter")
    return read_description(folder), load_file(folder / WEIGHTS_FILE)


def read_description(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says."""
    return json.loads((folder / CONFIG_FILE).read_text())


def require_fit(
    attached: AttachedAdapters, description: dict[str, Any], samples: dict[str, Tensor], folder: Path
) -> None:
    """Refuse an adapter of another shape or of another base model.

    Raises:
        MeftConfigError: naming what differs.
    """
    saved, own = description["meft"]["adapter"], attached.config.resolved()["adapter"]
    for key in ("rows", "num_experts", "experts_per_token", "top_k", "gate"):
        if saved[key] != own[key]:
            raise MeftConfigError(f"{folder} was saved with adapter.{key} = {saved[key]}, not {own[key]}")
    if description["ffns"] != list(attached.adapters):
        raise MeftConfigError(
            f"{folder} adapts {len(description['ffns'])} FFNs ({description['ffns'][0]}, …), this model "
            f"{len(attached.adapters)} ({next(iter(attached.adapters))}, …): it is of another model or other layers"
        )
    for name, sample in attached.base_samples.items():
        other = samples[f"{name}.base_sample"]
        # The same model may have been loaded in another precision.
        if other.shape != sample.shape or not torch.allclose(other, sample, rtol=0.02, atol=1e-4):
            raise MeftConfigError(f"{folder} was trained on another base model: the weights of {name} differ")


def fill(attached: AttachedAdapters, description: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Put saved tensors into a model's adapters, after checking that they fit.

    Raises:
        MeftConfigError: if they do not.
    """
    require_fit(attached, description, tensors, folder)
    for name, adapter in attached.adapters.items():
        expected = {"keys": adapter.keys.master, "values": adapter.values.master, "router": adapter.router}
        for kind, tensor in expected.items():
            found = tensors.get(f"{name}.{kind}")
            if found is None or found.shape != tensor.shape:
                shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise MeftConfigError(f"{folder}: {name}.{kind} is {shape}, not {tuple(tensor.shape)}")
        adapter.keys.fill(tensors[f"{name}.keys"])
        adapter.values.fill(tensors[f"{name}.values"])
        with torch.no_grad():
            adapter.router.copy_(tensors[f"{name}.router"])


def _resolve(folder: Path) -> Path:
    """The folder with the adapter's files: itself, or the ``meft`` folder of a checkpoint."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    latest = folder / "latest"
    if latest.is_file():
        return folder / latest.read_text().strip() / "meft"
    return folder / "meft" if (folder / "meft").is_dir() else folder
