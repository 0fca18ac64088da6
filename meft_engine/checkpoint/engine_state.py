"""What a checkpoint adds to DeepSpeed's own files: a ``meft`` folder with rows, moments, steps and random state.

<tag>/meft/adapter_config.json        the resolved block and the FFNs' names
<tag>/meft/adapter_model.safetensors  rows (in bf16 with their lower planes), routers, samples of the base
<tag>/meft/optimizer.safetensors      step, exp_avg, exp_avg_sq of every table; the history of steps where it is needed
<tag>/meft/random_state.safetensors   generators of Python, NumPy and PyTorch
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from meft_engine.checkpoint import adapter_files, random_state
from meft_engine.config import MeftConfigError

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

FOLDER = adapter_files.SUBFOLDER
_RANDOM_FILE = "random_state.safetensors"


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
    """Write the ``meft`` folder of a checkpoint; it gets its name only when it is whole."""
    folder = tag_folder / FOLDER
    partial = tag_folder / f"{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    adapter_files.save_adapter(engine.meft_adapters, partial, masters=True)
    optimizer = engine.row_optimizer
    save_file(
        {name: value.contiguous() for name, value in (optimizer.saved_state() | optimizer.histories()).items()},
        partial / adapter_files.OPTIMIZER_FILE,
        metadata={"groups": json.dumps(optimizer.groups_of_tables())},
    )
    save_file(random_state.capture(), partial / _RANDOM_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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
    files = (
        adapter_files.CONFIG_FILE,
        adapter_files.WEIGHTS_FILE,
        adapter_files.OPTIMIZER_FILE,
        _RANDOM_FILE,
    )
    adapter_files.require_files(folder / FOLDER, *files)
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
    path = folder / adapter_files.OPTIMIZER_FILE
    with safe_open(path, "pt") as file:
        shapes = {name: value.shape for name, value in engine.row_optimizer.saved_state().items()}
        adapter_files.require_shapes(file, shapes, path)
        for name in engine.row_optimizer.histories():
            if name not in file.keys():  # noqa: SIM118
                raise MeftConfigError(f"{path}: {name} is missing")


def load(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Restore what :func:`require_match` accepted: the adapter and, to ``resume``, moments, steps, random state."""
    folder = tag_folder / FOLDER
    adapter_files.fill(engine.meft_adapters, folder)
    engine.row_optimizer.zero_grad()
    if resume:
        optimizer = engine.row_optimizer
        with safe_open(folder / adapter_files.OPTIMIZER_FILE, "pt") as file:
            for name, value in optimizer.saved_state().items():
                value.copy_(file.get_tensor(name))
            optimizer.load_histories({name: file.get_tensor(name) for name in optimizer.histories()})
        random_state.restore(load_file(folder / _RANDOM_FILE))


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
