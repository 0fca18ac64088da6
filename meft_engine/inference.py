"""`load_adapter`: a saved adapter on a plain transformers model, without DeepSpeed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from torch import nn

from meft_engine.adapter.attach import DTYPES, AttachedAdapters, attach
from meft_engine.adapter.named import require_free, switches, take_off
from meft_engine.adapter.switch import DEFAULT_NAME
from meft_engine.checkpoint import adapter_files
from meft_engine.checkpoint.catch_up import current_rows
from meft_engine.checkpoint.saved_adapter import SavedAdapter, find_adapter
from meft_engine.config import MeftConfig, MeftConfigError

_PLACES = ("host", "device")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = DEFAULT_NAME,
    rows: Literal["host", "device"] = "host",
) -> nn.Module:
    """Give a plain transformers model a saved adapter, for inference.

    The model may have others. As in PEFT, the first one acts until :func:`meft_engine.set_adapter` names another.

    Args:
        model: the base model that the adapter was trained on, on the device where it will compute.
        folder: what ``engine.save_adapter`` wrote, or a checkpoint folder (its ``latest`` is taken).
        name: tells it from other adapters of the model.
        rows: ``"host"``: values stay in host memory, and those that a batch needs visit the device. ``"device"``: the
            model's device holds all of them too, as it holds the keys in any case. The logits are the same.

    Returns:
        The same model; its forward and ``generate`` now include the adapter.

    Raises:
        FileNotFoundError: if a file is missing.
        MeftConfigError: if the adapter does not fit the model, a file is not what was saved, the name is taken or
            ``rows`` is neither. Whatever is
            raised, the model is left as it was.
    """
    attach_saved(model, Path(folder), name=name, rows=rows)
    return model


def attach_saved(
    model: nn.Module, folder: Path, *, name: str = DEFAULT_NAME, rows: Literal["host", "device"] = "host"
) -> AttachedAdapters:
    """What :func:`load_adapter` does; gives the adapters."""
    if rows not in _PLACES:
        raise MeftConfigError(f'rows = {rows!r} is no place for rows; use "host" or "device"')
    require_free(model, name)
    with SavedAdapter(find_adapter(folder)) as saved:
        saved.require_whole()
        attached = attach(
            model,
            MeftConfig.from_block(saved.description["meft"]),
            compute_dtype=DTYPES[saved.description["compute_dtype"]],
            trainable=False,
            name=name,
            values_on_device=rows == "device",
        )
        try:
            fill_from(attached, saved)
        except BaseException:
            take_off(model, [switch for switch in switches(model) if switch.name == name])
            raise
    return attached


def fill_from(attached: AttachedAdapters, saved: SavedAdapter) -> None:
    """Put a saved adapter into adapters of its shape, over its base model.

    Raises:
        MeftConfigError: naming what does not fit; then nothing was changed.
    """
    adapter_files.require_fit(attached, saved)
    if saved.is_checkpoint and attached.config.optimizer.mode == "dense_equivalent":
        adapter_files.fill(attached, saved, functools.partial(current_rows, saved))
    else:
        adapter_files.fill(attached, saved, lambda ffn, kind, part: saved.compute_rows(ffn, kind, part).float())
