"""What a checkpoint adds to DeepSpeed's own files: a ``meft`` folder with rows, moments, steps and random state.

<tag>/meft/adapter_config.json           the resolved block and the FFNs' names
<tag>/meft/adapter_model.safetensors     compute copies of all rows, routers, samples of the base
<tag>/meft/rank-<i>-of-<n>.safetensors   of each rank: what it alone has of its rows, and its random state
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from meft_engine.checkpoint import adapter_files, random_state, rank_files
from meft_engine.config import MeftConfigError

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

FOLDER = adapter_files.SUBFOLDER


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


def save(engine: MeftEngine, tag_folder: Path) -> None:
    """Write the ``meft`` folder of a checkpoint; it gets its name only when it is whole.

    Raises:
        RanksDisagreeError: if another rank could not write its part.
    """
    folder = tag_folder / FOLDER
    partial = tag_folder / f"{FOLDER}.partial"
    ranks, leads = engine.ranks, engine.ranks.rank == 0

    def begin() -> None:
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        adapter_files.save_adapter(engine.meft_adapters, partial, resumable=True, write=leads)
        rank_files.save_rank(engine.row_optimizer, partial, ranks.rank, ranks.size)

    def finish() -> None:
        if leads:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)

    for part in (begin, write, finish):
        ranks.agree(part, f"write its part of {folder}")


def set_latest(engine: MeftEngine, save_dir: Path, tag: str) -> None:
    """Let ``latest`` name a checkpoint, once every rank has written its part of it."""
    engine.ranks.barrier()
    if engine.ranks.rank == 0:
        partial = save_dir / "latest.partial"
        partial.write_text(tag)
        partial.replace(save_dir / "latest")
    engine.ranks.barrier()


def find_checkpoint(load_dir: str, tag: str | None) -> Path:
    """The folder of a checkpoint's tag, all of whose ``meft`` files are there.

    Raises:
        FileNotFoundError: naming the file that is missing (DeepSpeed alone would start from scratch in silence).
    """
    latest = Path(load_dir, "latest")
    if tag is None:
        if not latest.is_file():
            raise FileNotFoundError(f"{latest} is missing; name a tag, or a folder that save_checkpoint wrote")
        tag = latest.read_text().strip()
    folder = Path(load_dir, tag)
    adapter_files.require_files(folder / FOLDER, adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE)
    rank_files.require_all(folder / FOLDER)
    return folder


def require_match(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Refuse a checkpoint of another model or adapter, or without DeepSpeed's files, before anything is changed.

    Raises:
        MeftConfigError: naming what differs.
        FileNotFoundError: naming the file that is missing.
    """
    _require_deepspeed_files(engine, tag_folder, resume)
    folder = tag_folder / FOLDER
    adapter_files.require_fit(engine.meft_adapters, folder)
    if not resume:
        return
    saved = adapter_files.read_description(folder)["meft"]["optimizer"]
    own = engine.meft_config.optimizer.model_dump()
    for key in ("mode", "moments_dtype"):
        if saved[key] != own[key]:
            raise MeftConfigError(
                f'{folder} was saved with optimizer.{key} = "{saved[key]}", not "{own[key]}"; resume with that, or '
                "load the adapter alone (load_optimizer_states=False)"
            )
    with rank_files.RankFiles(folder) as files:
        shapes = {name: value.shape for name, value in engine.row_optimizer.saved_state().items()}
        files.require(shapes, list(engine.row_optimizer.histories()))


def load(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Restore what :func:`require_match` accepted: the adapter and, to ``resume``, moments, steps, random state."""
    folder = tag_folder / FOLDER
    optimizer = engine.row_optimizer
    optimizer.zero_grad()
    with rank_files.RankFiles(folder) as files:
        adapter_files.fill(engine.meft_adapters, folder, files)
        if resume:
            for name, value in optimizer.saved_state().items():
                table, kind = optimizer.table_of(name), name.rsplit("/", 1)[1]
                if kind != "low":  # which came with the rows
                    for rows in table.stored:
                        value[rows] = files.read(table.name, kind, rows)
            optimizer.load_histories({name: files.tensor(name) for name in optimizer.histories()})
            states = files.random_state(engine.ranks.rank)
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
    adapter_files.require_files(tag_folder, *(Path(file).name for file in files))
    if resume and not zero and any(tag_folder.glob("*zero_pp_rank_*_optim_states.pt")):
        raise MeftConfigError(
            f"{tag_folder} was saved under ZeRO, whose optimizer states zero_optimization.stage = 0 cannot read; "
            "resume with the stage that it was saved with"
        )
