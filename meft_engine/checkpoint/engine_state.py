"""What a checkpoint adds to DeepSpeed's own files: a ``meft`` folder with rows, moments, steps and random state.

<tag>/meft/adapter_config.json        the resolved block and the FFNs' names
<tag>/meft/adapter_model.safetensors  fp32 master rows, routers, samples of the base
<tag>/meft/optimizer.safetensors      step, exp_avg, exp_avg_sq of every table
<tag>/meft/random_state.safetensors   generators of Python, NumPy and PyTorch
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from meft_engine.checkpoint import adapter_files, random_state
from meft_engine.config import MeftConfigError

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

FOLDER = "meft"
_OPTIMIZER_FILE = "optimizer.safetensors"
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
    moments = {
        f"{table.name}/{key}": value
        for table in engine.row_optimizer.tables()
        for key, value in engine.row_optimizer.state[table.master].items()
    }
    save_file(moments, partial / _OPTIMIZER_FILE)
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
    for name in (adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE, _OPTIMIZER_FILE, _RANDOM_FILE):
        if not (folder / FOLDER / name).is_file():
            raise FileNotFoundError(f"{folder / FOLDER / name} is missing; this checkpoint cannot be resumed")
    return folder


def require_match(engine: MeftEngine, tag_folder: Path) -> None:
    """Refuse a checkpoint of another model or adapter, before anything of the engine is changed.

    Raises:
        MeftConfigError: naming what differs.
    """
    folder = tag_folder / FOLDER
    attached = engine.meft_adapters
    description = adapter_files.read_description(folder)
    with safe_open(folder / adapter_files.WEIGHTS_FILE, "pt") as file:
        names = [f"{name}.base_sample" for name in description["ffns"]]
        samples = {name: file.get_tensor(name) for name in names}
    adapter_files.require_fit(attached, description, samples, folder)


def load(engine: MeftEngine, tag_folder: Path) -> None:
    """Restore rows, moments, steps and random state.

    Raises:
        MeftConfigError: if a tensor is missing or of another shape.
    """
    folder = tag_folder / FOLDER
    adapter_files.fill(engine.meft_adapters, *adapter_files.read_adapter(folder), folder)
    moments = load_file(folder / _OPTIMIZER_FILE)
    for table in engine.row_optimizer.tables():
        for key, value in engine.row_optimizer.state[table.master].items():
            saved = moments.get(f"{table.name}/{key}")
            if saved is None or saved.shape != value.shape:
                raise MeftConfigError(f"{folder / _OPTIMIZER_FILE} holds no {table.name}/{key} of {tuple(value.shape)}")
            value.copy_(saved)
    engine.row_optimizer.zero_grad()
    random_state.restore(load_file(folder / _RANDOM_FILE))
