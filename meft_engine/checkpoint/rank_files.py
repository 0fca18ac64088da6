"""What each rank adds to a checkpoint: lower planes, moments and steps of the rows that it owns, and its random state.

<tag>/meft/rank-<i>-of-<n>.safetensors. Rows have their places in the table, so that any number of ranks reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meft_engine.checkpoint import random_state
from meft_engine.config import MeftConfigError
from meft_engine.optim.sparse_adam import SparseCPUAdam

_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.safetensors")
_RANDOM = "random_state/"


def file_name(rank: int, ranks: int) -> str:
    """Of the file of one rank."""
    return f"rank-{rank}-of-{ranks}.safetensors"


def save_rank(optimizer: SparseCPUAdam, folder: Path, rank: int, ranks: int) -> None:
    """Write this rank's file.

    Tensors: ``<table>/low`` [n, d] int16, in bf16; ``<table>/step`` [n], ``<table>/exp_avg`` and ``exp_avg_sq`` [n, d];
    the history of steps where the mode needs it; ``random_state/…``.
    """
    tensors = dict(optimizer.histories())
    for name, value in optimizer.saved_state().items():
        owned = optimizer.table_of(name).owned
        tensors[name] = value[owned].contiguous()
    tensors |= {_RANDOM + name: value for name, value in random_state.capture().items()}
    starts = {table.name: [table.owned.start, table.owned.stop] for table in optimizer.tables()}
    metadata = {"rows": json.dumps(starts), "groups": json.dumps(optimizer.groups_of_tables())}
    save_file(tensors, folder / file_name(rank, ranks), metadata=metadata)


class RankFiles:
    """The files of all ranks of a checkpoint, as tables that are whole again; a context manager.

    Raises:
        FileNotFoundError: if one of them is missing.
        MeftConfigError: if files of several numbers of ranks lie there.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = _all_files(folder)
        self._stack = ExitStack()
        self._files: list[Any] = []

    def __enter__(self) -> RankFiles:
        self._files = [self._stack.enter_context(safe_open(path, "pt")) for path in self._paths]
        self._names = [set(file.keys()) for file in self._files]
        self._rows = [json.loads(file.metadata()["rows"]) for file in self._files]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def ranks(self) -> int:
        """How many ranks wrote them."""
        return len(self._paths)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """What :meth:`SparseCPUAdam.groups_of_tables` said."""
        return json.loads(self._files[0].metadata()["groups"])

    def has(self, name: str) -> bool:
        """Whether a tensor of this name was saved."""
        return name in self._names[0]

    def tensor(self, name: str) -> Tensor:
        """One that every rank has alike."""
        return self._files[0].get_tensor(name)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """Of the rank with this number; empty if there was none."""
        if rank >= self.ranks:
            return {}
        names = [name for name in self._names[rank] if name.startswith(_RANDOM)]
        return {name.removeprefix(_RANDOM): self._files[rank].get_tensor(name) for name in names}

    def read(self, table: str, kind: str, rows: slice) -> Tensor:
        """[n, …]: consecutive rows of a kind (``low``, ``step``, ``exp_avg``, ``exp_avg_sq``) of a table."""
        parts = []
        for file, of_table in zip(self._files, self._rows, strict=True):
            start, stop = of_table[table]
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                parts.append(file.get_slice(f"{table}/{kind}")[first - start : last - start])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def require(self, shapes: dict[str, Sequence[int]], histories: Sequence[str]) -> None:
        """Check that the files hold whole tables of these shapes, by the names of a table and a kind.

        Raises:
            MeftConfigError: naming the first that is missing or of another shape.
        """
        folder = self._paths[0].parent
        for name, shape in shapes.items():
            table, kind = name.rsplit("/", 1)
            if not all(name in names for names in self._names):
                raise MeftConfigError(f"{folder}: {name} is missing, where {tuple(shape)} is needed")
            pieces = [tuple(file.get_slice(name).get_shape()) for file in self._files]
            ranges = [of_table[table] for of_table in self._rows]
            whole = [list(pair) for pair in zip([0, *(r[1] for r in ranges)], (r[1] for r in ranges), strict=False)]
            found = (sum(piece[0] for piece in pieces), *pieces[0][1:])
            fitting = all(piece[0] == stop - start for piece, (start, stop) in zip(pieces, ranges, strict=True))
            if whole != ranges or not fitting or found != tuple(shape):
                raise MeftConfigError(f"{folder}: {name} has shape {found}, where {tuple(shape)} is needed")
        for name in histories:
            if not self.has(name):
                raise MeftConfigError(f"{folder}: {name} is missing")


def are_in(folder: Path) -> bool:
    """Whether a folder is a checkpoint's, and not an adapter alone."""
    return any(_NAME.fullmatch(path.name) for path in folder.glob("rank-*"))


def require_all(folder: Path) -> None:
    """Check that no rank's file is missing.

    Raises:
        FileNotFoundError, MeftConfigError: as :class:`RankFiles`.
    """
    _all_files(folder)


def _all_files(folder: Path) -> list[Path]:
    found = {match[0]: int(match[2]) for path in folder.glob("rank-*") if (match := _NAME.fullmatch(path.name))}
    counts = set(found.values())
    if len(counts) > 1:
        raise MeftConfigError(
            f"{folder} holds files of {' and of '.join(map(str, sorted(counts)))} ranks; remove those that do not "
            "belong there"
        )
    ranks = counts.pop() if counts else 1
    paths = [folder / file_name(rank, ranks) for rank in range(ranks)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so nothing can be loaded from {folder}")
    return paths
