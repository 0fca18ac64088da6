"""An adapter in a folder, whichever way it got there: exported to travel alone, or as a part of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meft_engine.checkpoint import folders
from meft_engine.checkpoint.shards import RowShards
from meft_engine.checkpoint.tensor_files import WrittenFile, open_safetensors
from meft_engine.config import MeftConfigError
from meft_engine.optim.history import StepHistory
from meft_kernels import planes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SHARED_FILE = "shared.safetensors"
"""Of a checkpoint: what all ranks have alike."""
PARAMETERS = "parameters/"
"""Before the names, in that file, of what DeepSpeed's optimizer holds of parameters."""
PEFT_TYPE = "MEFT"
FORMAT = 5


class SavedAdapter:
    """Reads an adapter's folder; a context manager. Nothing is read before it is entered, and rows only when asked for.

    Args:
        folder: what :func:`find_adapter` gave.

    Raises:
        FileNotFoundError: if a file is missing.
        MeftConfigError: if a file is of another format or torn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_description(folder)
        self.shards: RowShards | None = None
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._names = {CONFIG_FILE}
        self._histories: dict[int, StepHistory] = {}

    def __enter__(self) -> SavedAdapter:
        if self.is_checkpoint:
            self.shards = self._stack.enter_context(RowShards(self.folder))
            self._names |= set(self.shards.names)
            names = [SHARED_FILE]
        elif (self.folder / INDEX_FILE).is_file():
            names = sorted(set(json.loads((self.folder / INDEX_FILE).read_text())["weight_map"].values()))
        else:
            names = [WEIGHTS_FILE]
        self._names |= set(names)
        for name in names:
            file = self._stack.enter_context(open_safetensors(self.folder / name))
            self._file_of.update(dict.fromkeys(file.keys(), file))
        self._metadata = file.metadata() or {}
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def require_whole(self, among: Callable[[list[str]], list[str]] = lambda names: names) -> None:
        """Check every file against its size and SHA-256.

        Args:
            among: which of the files to check, where ranks divide the work.

        Raises:
            FileNotFoundError: naming a file that is missing.
            TornCheckpointError: naming a file that is not what was saved.
        """
        folder, own = self.folder, self._names
        if self.is_checkpoint:
            own = {f"{folder.name}/{name}" for name in own}
            folder = folder.parent
            files = folders.read_manifest(folder).files
        else:
            own = own - {CONFIG_FILE}
            files = {name: WrittenFile(**file) for name, file in self.description["files"].items()}
        for name in sorted(own - files.keys()):
            raise folders.TornCheckpointError(f"{folder / name} is not in the list of what was saved; do not use it")
        folders.require_whole(folder, files, among(sorted(files)))

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is the folder of a checkpoint with our files, which its manifest lists, and no adapter alone."""
        return "files" not in self.description

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Of a checkpoint: what :meth:`SparseCPUAdam.groups_of_tables` said."""
        return json.loads(self._metadata["groups"])

    def history(self, index: int) -> StepHistory:
        """Of a checkpoint in the mode "dense_equivalent": the settings of every step of a group."""
        if index not in self._histories:
            self._histories[index] = StepHistory()
            self._histories[index].load(self.tensor(f"group{index}/history"))
        return self._histories[index]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor that is no table, or of an exported table; ``None`` if there is none of this name."""
        return tuple(self._file_of[name].get_slice(name).get_shape()) if name in self._file_of else None

    def tensor(self, name: str) -> Tensor:
        """One that is no table."""
        return self._file_of[name].get_tensor(name)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All whose names begin so, without that."""
        names = [name for name in self._file_of if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def require_table(self, ffn: str, kind: str, shape: torch.Size) -> None:
        """Check that all rows of ``keys`` or ``values`` are there, in a shape [r, d].

        Raises:
            MeftConfigError: if they are not.
        """
        if self.shards is not None:
            self.shards.require(f"{ffn}/{kind}", {"compute": torch.empty(()).expand(shape)})
        else:
            require_shapes(self, {f"{ffn}.{kind}": shape}, self.folder)

    def compute_rows(self, ffn: str, kind: str, rows: slice) -> Tensor:
        """[n, d]: the compute copies of consecutive rows of ``keys`` or ``values``."""
        if self.shards is not None:
            return self.shards.read(f"{ffn}/{kind}", "compute", rows)
        name = f"{ffn}.{kind}"
        return self._file_of[name].get_slice(name)[rows]

    def master_rows(self, ffn: str, kind: str, rows: slice) -> Tensor:
        """[n, d] float32: their masters, which are the compute copies where no more was saved."""
        compute = self.compute_rows(ffn, kind, rows)
        if self.shards is None or not self.shards.has(f"{ffn}/{kind}", "low"):
            return compute.float()
        return planes.join(compute.contiguous(), self.shards.read(f"{ffn}/{kind}", "low", rows))


def find_adapter(folder: Path) -> Path:
    """Where the adapter's files are: there, in the folder ``meft`` there, or in the checkpoint that ``latest`` names.

    Raises:
        FileNotFoundError: if there is none.
    """
    config = folder / CONFIG_FILE
    # A LoRA's file has the same name.
    if config.is_file() and json.loads(config.read_text()).get("peft_type") == PEFT_TYPE:
        return folder
    if (folder / folders.SUBFOLDER / CONFIG_FILE).is_file():
        return folder / folders.SUBFOLDER
    if (folder / folders.LATEST).is_file():
        return folders.find(folder, None) / folders.SUBFOLDER
    raise FileNotFoundError(f"{config} is missing, so nothing can be loaded from {folder}")


def read_description(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        FileNotFoundError: if it is missing.
        MeftConfigError: if it cannot be read, or is of a format that this version does not read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so nothing can be loaded from {folder}")
    try:
        description = json.loads(path.read_text())
        found = description.get("format")
    except (ValueError, AttributeError) as error:
        raise folders.TornCheckpointError(f"{path} cannot be read ({error}); load another one") from None
    if found != FORMAT:
        raise MeftConfigError(
            f"{path} has format = {found!r}, and this version reads {FORMAT}; load it with the version of meft_engine "
            "that wrote it"
        )
    return description


def require_shapes(saved: SavedAdapter, expected: dict[str, torch.Size], path: Path) -> None:
    """Check tensors against the shapes of those that they are to be copied into.

    Raises:
        MeftConfigError: naming the first that is missing or of another shape.
    """
    for name, needed in expected.items():
        shape = saved.shape(name)
        if shape != tuple(needed):
            found = "is missing" if shape is None else f"has shape {shape}"
            raise MeftConfigError(f"{path}: {name} {found}, where {tuple(needed)} is needed")
