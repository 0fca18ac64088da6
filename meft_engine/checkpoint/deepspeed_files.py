"""DeepSpeed's own files of a checkpoint: which have to be there, and reading them without running what is in them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

logger = logging.getLogger("meft_engine")


def required(engine: MeftEngine, tag_folder: Path, *, resume: bool) -> list[str]:
    """Names of the files without which DeepSpeed cannot load a checkpoint of this engine's layout.

    It asserts without a word where its model states are missing, and has changed the model before it looks for ZeRO's
    optimizer states.
    """
    place = str(tag_folder.parent), tag_folder.name
    files = [engine._get_ckpt_name(*place)]
    if resume and engine.zero_optimization():
        files.append(engine._get_zero_ckpt_name(*place))
    return [Path(file).name for file in files]


def model_states(tag_folder: Path) -> Path:
    """Rank 0's file of what is no optimizer's, as any stage writes it.

    Raises:
        FileNotFoundError: if there is none.
    """
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for name in names:
        if (tag_folder / name).is_file():
            return tag_folder / name
    raise FileNotFoundError(f"{tag_folder / names[0]} is missing, so nothing can be loaded from {tag_folder}")


def read(path: str | Path, map_location: Any = "cpu") -> Any:
    """The content of one of the files, by ``weights_only=True`` where that is possible.

    It is where a client's state and a scheduler's hold tensors and plain values alone. Else DeepSpeed's way is taken,
    whose objects can run code: the file's sum has been checked, but only its owner knows who could write the folder.
    """
    with torch.serialization.safe_globals(_classes()):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            logger.warning(
                "%s holds objects that only pickle can read, which may run code (%s); keep a client_state and a "
                "scheduler to tensors and plain values to avoid it",
                path,
                str(error).partition("\n")[0],
            )
            return torch.load(path, map_location=map_location, weights_only=False)


@contextmanager
def without_code(checkpoint_engine: Any) -> Iterator[None]:
    """Inside, DeepSpeed reads its files by :func:`read`."""
    checkpoint_engine.load = read
    try:
        yield
    finally:
        del checkpoint_engine.load


def _classes() -> list[Any]:
    """What DeepSpeed itself puts into its files besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
