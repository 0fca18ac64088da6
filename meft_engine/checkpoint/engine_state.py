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
from torch import Tensor

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
    save_file(_moments(engine), partial / _OPTIMIZER_FILE)
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
    files = (adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE, _OPTIMIZER_FILE, _RANDOM_FILE)
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
    with safe_open(folder / _OPTIMIZER_FILE, "pt") as file:
        adapter_files.require_shapes(file, _moments(engine), folder / _OPTIMIZER_FILE)


def load(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> None:
    """Restore what :func:`require_match` accepted: the adapter and, to ``resume``, moments, steps, random state."""
    folder = tag_folder / FOLDER
    adapter_files.fill(engine.meft_adapters, folder)
    engine.row_optimizer.zero_grad()
    if resume:
        with safe_open(folder / _OPTIMIZER_FILE, "pt") as file:
            for name, value in _moments(engine).items():
                value.copy_(file.get_tensor(name))
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


def _moments(engine: MeftEngine) -> dict[str, Tensor]:
    """The row optimizer's state, by its names in a checkpoint."""
    return {
        f"{table.name}/{key}": value
        for table in engine.row_optimizer.tables()
        for key, value in engine.row_optimizer.state[table.master].items()
    }
