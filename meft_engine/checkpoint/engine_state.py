"""Loads a checkpoint into an engine: everything is checked before anything is changed.

<tag>/meft/manifest.json              sizes and SHA-256 of all files
<tag>/meft/adapter_config.json        the resolved block and the FFNs' names
<tag>/meft/shared.safetensors         routers, samples of the base, the history of steps
<tag>/meft/rows-<i>-of-<n>.safetensors   of each rank: the rows that it owned, their state, its random state
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meft_engine.checkpoint import adapter_files, deepspeed_files, folders, parameter_state, random_state
from meft_engine.checkpoint.saved_adapter import PARAMETERS, SavedAdapter
from meft_engine.config import MeftConfigError
from meft_engine.offload.memory import pieces

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine


def require_boundary(micro_steps_done: int, micro_steps: int) -> None:
    """Refuse to save inside an accumulation window.

    Raises:
        RuntimeError: naming the micro-step.
    """
    if micro_steps_done:
        raise RuntimeError(
            f"save_checkpoint was called inside an accumulation window, after micro-step {micro_steps_done} of "
            f"{micro_steps}, whose gradients would be lost; save after the step that ends the window"
        )


def require_match(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Refuse what is torn, or of another model or adapter, before anything is changed; every rank calls it.

    Raises:
        MeftConfigError: naming what differs.
        FileNotFoundError: naming the file that is missing.
        RanksDisagreeError: naming what another rank has found.
    """
    engine.ranks.agree(lambda: _require_match(engine, tag_folder, resume), f"load {tag_folder}")


def _require_match(engine: MeftEngine, tag_folder: Path, resume: bool) -> None:
    manifest, ranks = folders.read_manifest(tag_folder), engine.ranks
    same = manifest.layout == parameter_state.layout_of(engine)
    files = deepspeed_files.required(engine, tag_folder, resume=resume) if same else []
    for name in [*files, deepspeed_files.model_states(tag_folder).name]:
        if not (tag_folder / name).is_file():
            raise FileNotFoundError(f"{tag_folder / name} is missing, so nothing can be loaded from {tag_folder}")
        if name not in manifest.files:
            raise folders.TornCheckpointError(
                f"{tag_folder / name} is not in the list of what was saved; do not use it"
            )
    with SavedAdapter(tag_folder / folders.SUBFOLDER) as saved:
        saved.require_whole(lambda names: names[ranks.rank :: ranks.size])
        adapter_files.require_fit(engine.meft_adapters, saved)
        if not same:
            _require_parameters(engine, saved, manifest.layout)
        if not resume:
            return
        theirs, own = saved.description["meft"]["optimizer"], engine.meft_config.optimizer.model_dump()
        for key in ("mode", "moments_dtype"):
            if theirs[key] != own[key]:
                raise MeftConfigError(
                    f'{saved.folder} was saved with optimizer.{key} = "{theirs[key]}", not "{own[key]}"; resume with '
                    "that, or load the adapter alone (load_optimizer_states=False)"
                )
        optimizer = engine.row_optimizer
        for table in optimizer.tables():
            saved.shards.require(table.name, optimizer.state[table.handle])
        for name in optimizer.histories():
            if saved.shape(name) is None:
                raise MeftConfigError(f"{saved.folder}: {name} is missing")


def load(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Restore what :func:`require_match` accepted: the adapter and, to ``resume``, moments, steps, random state."""
    optimizer = engine.row_optimizer
    optimizer.zero_grad()
    with SavedAdapter(tag_folder / folders.SUBFOLDER) as saved:
        adapter_files.fill(engine.meft_adapters, saved, saved.master_rows)
        if resume:
            for table in optimizer.tables():
                for kind, value in optimizer.state[table.handle].items():
                    row_bytes = value[:1].numel() * value.element_size()
                    for part in table.stored:
                        for rows in pieces(part, row_bytes):
                            value[rows] = saved.shards.read(table.name, kind, rows)
            optimizer.load_histories({name: saved.tensor(name) for name in optimizer.histories()})
            states = saved.shards.random_state(engine.ranks.rank)
            if states:
                random_state.restore(states)
    engine.ranks.barrier()  # no rank reads what another has yet to load


def has_its_layout(engine: MeftEngine, tag_folder: Path) -> bool:
    """Whether DeepSpeed can load its own files of a checkpoint, which are bound to the layout of the run."""
    return folders.read_manifest(tag_folder).layout == parameter_state.layout_of(engine)


def load_parameters(engine: MeftEngine, tag_folder: Path, *, resume: bool, lr_scheduler: bool) -> dict[str, Any]:
    """Restore, into an engine of another layout, what DeepSpeed would restore: trained parameters with their masters
    and moments, counts of steps, the scheduler of the learning rate.

    Returns:
        The client's state, as DeepSpeed's ``load_checkpoint`` returns it.
    """
    with SavedAdapter(tag_folder / folders.SUBFOLDER) as saved:
        tensors = saved.tensors(PARAMETERS)
    states = deepspeed_files.read(deepspeed_files.model_states(tag_folder))
    if not resume:
        tensors = parameter_state.without_optimizer_state(engine, tensors)
    parameter_state.restore(engine, tensors)
    return parameter_state.restore_progress(engine, states, lr_scheduler=lr_scheduler)


def _require_parameters(engine: MeftEngine, saved: SavedAdapter, layout: dict[str, int | str]) -> None:
    own, tensors = parameter_state.layout_of(engine), saved.tensors(PARAMETERS)
    reason = parameter_state.supported(engine)
    if reason is None and not tensors:
        reason = "the checkpoint has no state of parameters for other layouts"
    if reason is None and saved.description["meft"]["checkpoint"]["save_base"]:
        reason = "it holds the base model (checkpoint.save_base = true)"
    if reason is not None:
        raise MeftConfigError(
            f"{saved.folder.parent} was saved with {_words(layout)}, and this run has {_words(own)}, which DeepSpeed "
            f"cannot take over, nor can MEFT: {reason}; resume with what it was saved with"
        )
    parameter_state.require(engine, tensors)


def _words(layout: dict[str, int | str]) -> str:
    return f"ZeRO stage {layout['zero_stage']}, {layout['ranks']} ranks and {layout['precision']}"
