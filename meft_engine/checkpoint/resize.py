"""Makes a checkpoint with more or with fewer rows out of another one, with which training goes on.

The number of experts stays, and with it routers, owners of rows and DeepSpeed's own files, which are copied. An expert
keeps its rows in their order, bit for bit with their moments and steps, and before any that are new: where two rows
score alike, the same one is still taken. New rows have values of zero, so that they change nothing but which rows
are picked.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.adapter.named import unload_adapter
from meft_engine.checkpoint import folders, shards
from meft_engine.checkpoint.comparison import Comparison, compare, row_use
from meft_engine.checkpoint.resized_rows import NEW, ResizedRows, require_rows
from meft_engine.checkpoint.saved_adapter import CONFIG_FILE, SavedAdapter
from meft_engine.checkpoint.saver import CheckpointSaveError, partial_of, reached
from meft_engine.checkpoint.tensor_files import WrittenFile
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.inference import attach_saved
from meft_engine.planner import host_bytes_needed, require_host_memory


@dataclass(frozen=True)
class Resized:
    """A checkpoint that was made of another one."""

    folder: Path
    former_rows: int
    rows: int
    num_experts: int
    comparison: Comparison | None
    """With the former one; ``None`` where there was no text."""


def grow(
    model: nn.Module,
    load_dir: Path,
    save_dir: Path,
    rows: int,
    *,
    tag: str | None = None,
    save_tag: str | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
) -> Resized:
    """Make a checkpoint with more rows in every expert.

    New keys are what ``adapter.init_keys`` gives to the rows that an adapter of the new size has and the former has
    not, dealt to the experts in their order. Their values and moments are zero, and they have taken no step (in the
    mode "dense_equivalent" they are current through the last one).

    Args:
        model: the base that training began with, without adapters; it is left so.
        load_dir, tag: as ``load_checkpoint`` has them. save_dir, save_tag: where to write; by default the same tag.
        rows: of each FFN from now on. batches: of a text, inputs of the model by name, over which both are compared.

    Raises:
        MeftConfigError: if the checkpoint is torn or of another base, the number of rows cannot be, there is such a
            checkpoint already, or memory is too small; nothing has been written then.
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        CheckpointSaveError: if it cannot be written.
    """
    return _resize(model, load_dir, save_dir, rows, "grow", tag, save_tag, batches)


def prune(
    model: nn.Module,
    load_dir: Path,
    save_dir: Path,
    rows: int,
    *,
    batches: Sequence[Mapping[str, Any]],
    tag: str | None = None,
    save_tag: str | None = None,
) -> Resized:
    """Make a checkpoint with fewer rows in every expert: those of least use on a text go, see :func:`kept_rows`.

    Args:
        batches: of the text, inputs of the model by name. The others: as :func:`grow` has them.

    Raises:
        As :func:`grow`, and MeftConfigError if there is no text.
    """
    return _resize(model, load_dir, save_dir, rows, "prune", tag, save_tag, batches)


def kept_rows(use: Tensor, updates: Tensor, num_experts: int, rows: int) -> Tensor:
    """[rows] int64, ascending: the rows of most use, as many in each expert; of equal ones those that were updated more
    often, and then those of lower id.

    Args:
        use: [r] float64. updates: [r] of any integer type, zeros where they do not count.
    """
    use, updates = use.view(num_experts, -1), updates.view(num_experts, -1)
    order = updates.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, use.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    kept = order[:, : rows // num_experts].sort(dim=1).values
    return (kept + use.shape[1] * torch.arange(num_experts)[:, None]).flatten()


def _resize(
    model: nn.Module,
    load_dir: Path,
    save_dir: Path,
    rows: int,
    kind: str,
    tag: str | None,
    save_tag: str | None,
    batches: Sequence[Mapping[str, Any]],
) -> Resized:
    former = folders.find(Path(load_dir), tag)
    name = former.name if save_tag is None else save_tag
    folders.require_tag(name)
    folder = Path(save_dir) / name
    if folder.exists():
        raise MeftConfigError(f"{folder} exists already and is not overwritten; choose another folder or tag")
    for file in folders.read_manifest(former).files:
        if not (former / file).is_file():
            raise FileNotFoundError(f"{former / file} is missing, so nothing can be loaded from {former}")
    with ExitStack() as stack:
        saved = stack.enter_context(SavedAdapter(former / folders.SUBFOLDER))
        saved.require_whole(lambda names: [name for name in names if name.endswith(CONFIG_FILE)])
        description = _resized(saved.description, rows, kind)
        if kind == "prune" and not batches:
            raise MeftConfigError(
                "without a text nothing is known of the use of rows, so none can be dropped; give one"
            )

        stack.enter_context(_evaluating(model))
        twin = _twin(model) if batches else None
        attached = attach_saved(model, former)  # refuses what is torn, or of another base
        stack.callback(unload_adapter, model)
        shape = attached.config.adapter
        require_rows(saved, attached, folders.read_manifest(former).layout)
        if twin is not None:
            _require_memory(attached, MeftConfig.from_block(description["meft"]))

        use = row_use(model, attached, batches) if kind == "prune" else {}
        sources = {a.name: _sources(saved, a.name, rows, use.get(a.name)) for a in attached.adapters.values()}
        _write(folder, former, ResizedRows(saved, attached, sources), description)
        comparison = None
        if twin is not None:
            after = attach_saved(twin, folder)
            stack.callback(unload_adapter, twin)
            places = {name: _places(source, shape.rows) for name, source in sources.items()}
            comparison = compare((model, attached), (twin, after), batches, places)
        return Resized(folder, shape.rows, rows, shape.resolved_num_experts, comparison)


# What is checked


def _resized(description: Mapping[str, Any], rows: int, kind: str) -> dict[str, Any]:
    """The description of the resized adapter.

    Raises:
        MeftConfigError: if there cannot be one of so many rows.
    """
    found = copy.deepcopy(dict(description))
    adapter = found["meft"]["adapter"]
    former, experts, top_k = adapter["rows"], adapter["num_experts"], adapter["top_k"]
    # A token scores the rows of its experts, which must not be fewer than those that it may keep.
    least, most = experts * -(-top_k // adapter["experts_per_token"]), former - experts
    limits = f"use a multiple of adapter.num_experts = {experts} "
    if kind == "grow":
        limits += f"from {former + experts} on"
        wrong = f"not more than the {former} that there are" if rows <= former else None
    elif least > most:
        raise MeftConfigError(f"rows = {rows} is too few: adapter.top_k = {top_k} needs the {former} that there are")
    else:
        limits += f"from {least} to {most}"
        wrong = f"not fewer than the {former} that there are" if rows >= former else None
        wrong = f"too few for adapter.top_k = {top_k}" if rows < least else wrong
    if rows % experts:
        wrong = "not the same number in every expert"
    if wrong is not None:
        raise MeftConfigError(f"rows = {rows} is {wrong}; {limits}")
    adapter["rows"] = rows
    limit = found["meft"]["active_rows"]
    if limit["cap"] == former:  # all rows, however many there are
        limit["cap"] = rows
    MeftConfig.from_block(found["meft"])
    return found


def _require_memory(attached: AttachedAdapters, config: MeftConfig) -> None:
    """Refuse what could be written, but not be compared with the former one, which stays in memory for that."""
    needed = sum(
        host_bytes_needed(config, 1, ffn.width, compute_dtype=attached.compute_dtype, trainable=False)
        for ffn in attached.ffns.values()
    )
    require_host_memory(needed, config, len(attached.ffns))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _twin(model: nn.Module) -> nn.Module:
    """The same model once more, over the same tensors, for another adapter."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


# Which row goes where


def _sources(saved: SavedAdapter, ffn: str, rows: int, use: Tensor | None) -> Tensor:
    """[rows] int64: which of the former rows each row of an FFN is, or -1 where it is new.

    Args:
        use: [r] of the former rows, of which the most useful are kept; ``None``: all are.
    """
    block = saved.description["meft"]
    former, experts = block["adapter"]["rows"], block["adapter"]["num_experts"]
    if use is None:
        found = torch.full((experts, rows // experts), NEW)
        found[:, : former // experts] = torch.arange(former).view(experts, -1)
        return found.flatten()
    updates = torch.zeros(former, dtype=torch.int32)
    if block["optimizer"]["mode"] == "lazy":  # else steps do not count the row's own updates
        updates = saved.shards.read(f"{ffn}/values", "step", slice(0, former))
    return kept_rows(use, updates, experts, rows)


def _places(source: Tensor, former: int) -> Tensor:
    """[former] int64: which row each former row has become, or -1 where it is gone."""
    found = torch.full((former,), -1)
    kept = source != NEW
    found[source[kept]] = torch.arange(len(source))[kept]
    return found


# What is written


def _write(folder: Path, former: Path, rows: ResizedRows, description: Mapping[str, Any]) -> None:
    """Write the checkpoint, whole or not at all, in the phases of :class:`CheckpointSaver`."""
    manifest, partial, latest = folders.read_manifest(former), partial_of(folder), folder.parent / folders.LATEST
    own, files = partial / folders.SUBFOLDER, {}
    try:
        reached("begin", folder)
        folders.remove(partial)
        own.mkdir(parents=True)
        reached("rows", folder)
        for rank in range(rows.ranks):
            name = shards.file_name(rank, rows.ranks)
            files[f"{folders.SUBFOLDER}/{name}"] = rows.write(rank, own / name)
        config = folders.write_text(own / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
        files[f"{folders.SUBFOLDER}/{CONFIG_FILE}"] = config
        reached("copies", folder)
        for name in sorted(manifest.files.keys() - files.keys()):
            files[name] = _copy(former / name, partial / name, manifest.files[name])
        reached("manifest", folder)
        folders.Manifest(folder.name, manifest.global_steps, manifest.layout, files).write(partial)
        folders.prepare_text(latest, folder.name)
        reached("place", folder)
        folders.put_in_place(partial, folder)
        reached("latest", folder)
        folders.put_text_in_place(latest)
    except BaseException as error:
        folders.remove(partial)
        latest.with_name(latest.name + folders.PARTIAL).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointSaveError(
                f"the checkpoint {folder} could not be written ({error}); {former} is untouched"
            ) from error
        raise


def _copy(source: Path, target: Path, expected: WrittenFile) -> WrittenFile:
    """Copy a file that is still what was saved.

    Raises:
        TornCheckpointError: if it is not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    folders.sync(target)
    if folders.digest(target) != expected:
        raise folders.TornCheckpointError(f"{source} has changed while it was copied; load another checkpoint")
    return expected
