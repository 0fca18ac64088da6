"""Loads a checkpoint into an engine: everything is checked before anything is changed.

<tag>/meft/manifest.json              sizes and SHA-256 of all files
<tag>/meft/adapter_config.json        the resolved block and the FFNs' names
<tag>/meft/shared.safetensors         routers, samples of the base, the history of steps
<tag>/meft/rows-<i>-of-<n>.safetensors   of each rank: the rows that it owned, their state, its random state
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meft_engine.checkpoint import adapter_files, folders, random_state
from meft_engine.checkpoint.saved_adapter import SavedAdapter
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
    _require_deepspeed_files(engine, tag_folder, resume)
    ranks = engine.ranks
    with SavedAdapter(tag_folder / folders.SUBFOLDER) as saved:
        saved.require_whole(lambda names: names[ranks.rank :: ranks.size])
        adapter_files.require_fit(engine.meft_adapters, saved)
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


def _require_deepspeed_files(engine: MeftEngine, tag_folder: Path, resume: bool) -> None:
    """DeepSpeed asserts without a word where its model states are missing, and has changed the model before it looks
    for ZeRO's optimizer states."""
    place, zero = (str(tag_folder.parent), tag_folder.name), engine.zero_optimization()
    files = [engine._get_ckpt_name(*place)]
    if resume and zero:
        files.append(engine._get_zero_ckpt_name(*place))
    for file in files:
        path = tag_folder / Path(file).name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so nothing can be loaded from {tag_folder}")
    if resume and not zero and any(tag_folder.glob("*zero_pp_rank_*_optim_states.pt")):
        raise MeftConfigError(
            f"{tag_folder} was saved under ZeRO, whose optimizer states zero_optimization.stage = 0 cannot read; "
            "resume with the stage that it was saved with"
        )
