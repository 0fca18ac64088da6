"""Rows in a checkpoint: a file of each rank with those that it owns, in blocks of consecutive rows.

<tag>/meft/rows-<i>-of-<n>.safetensors holds ``<table>/<kind>/<first>-<last + 1>`` for every block: ``compute`` [n, d]
(bf16, or the fp32 masters), ``low`` [n, d] int16 (the rest of a master in bf16), ``step`` [n] int32, ``exp_avg`` and
``exp_avg_sq`` [n, d]; and the rank's ``random_state/…``. Rows have their numbers in the table, so that any number of
ranks reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from meft_engine.checkpoint.snapshot import Block
from meft_engine.checkpoint.tensor_files import (
    TYPES,
    Described,
    SafetensorsStream,
    WrittenFile,
    open_safetensors,
)
from meft_engine.config import MeftConfigError
from meft_engine.offload.tensor import PartiallyOffloadedTensor

_NAME = re.compile(r"rows-(\d+)-of-(\d+)\.safetensors")
_BLOCK = re.compile(r"(.+)/([a-z_]+)/(\d+)-(\d+)")
_RANDOM = "random_state/"


def file_name(rank: int, ranks: int) -> str:
    """Of the file of one rank."""
    return f"rows-{rank}-of-{ranks}.safetensors"


class RowSource(Protocol):
    """Where the rows of a rank come from, such as :class:`RowSnapshot`."""

    def blocks(self) -> Iterable[Block]:
        """Table by table, from the first row on."""

    def kinds(self, table: PartiallyOffloadedTensor) -> Mapping[str, Tensor]:
        """What there is of a table, by kind; for shapes and types, not for what is in it."""

    def take(self, block: Block) -> Mapping[str, Tensor]:
        """A block's rows by kind, in the order of :meth:`kinds`; each is taken once, in the order of the blocks, and is
        only good until the next is taken."""


def write_rows(snapshot: RowSource, random_state: Mapping[str, Tensor], path: Path) -> WrittenFile:
    """Write what a rank owns, block by block."""
    tensors = {_RANDOM + name: Described(tuple(value.shape), value.dtype) for name, value in random_state.items()}
    for table, rows in snapshot.blocks():
        count = rows.stop - rows.start
        for kind, plane in snapshot.kinds(table).items():
            described = Described((count, *plane.shape[1:]), plane.dtype)
            tensors[f"{table.name}/{kind}/{rows.start}-{rows.stop}"] = described
    with SafetensorsStream(path, tensors) as stream:
        for value in random_state.values():
            stream.write(value)
        for block in snapshot.blocks():
            for plane in snapshot.take(block).values():
                stream.write(plane)
        return stream.finish()


class _Part(NamedTuple):
    """A block in a file."""

    start: int
    stop: int
    file: Any
    name: str


class RowShards:
    """The files of all ranks of a checkpoint, as tables that are whole again; a context manager.

    Raises:
        FileNotFoundError: if one of them is missing.
        MeftConfigError: if files of several numbers of ranks lie there, or one is no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = _all_files(folder)
        self._stack = ExitStack()
        self._files: list[Any] = []
        self._parts: dict[tuple[str, str], list[_Part]] = {}

    def __enter__(self) -> RowShards:
        for path in self._paths:
            file = self._stack.enter_context(open_safetensors(path))
            self._files.append(file)
            for name in file.keys():  # noqa: SIM118
                if match := _BLOCK.fullmatch(name):
                    table, kind, start, stop = match.groups()
                    self._parts.setdefault((table, kind), []).append(_Part(int(start), int(stop), file, name))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of the files."""
        return [path.name for path in self._paths]

    @property
    def ranks(self) -> int:
        """How many ranks wrote them."""
        return len(self._paths)

    def has(self, table: str, kind: str) -> bool:
        """Whether a kind was saved of a table."""
        return (table, kind) in self._parts

    def read(self, table: str, kind: str, rows: slice) -> Tensor:
        """[n, …]: consecutive rows of a kind of a table."""
        parts = []
        for start, stop, file, name in self._parts[table, kind]:
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                parts.append(file.get_slice(name)[first - start : last - start])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """Of the rank with this number; empty if there was none."""
        if rank >= self.ranks:
            return {}
        names = [name for name in self._files[rank].keys() if name.startswith(_RANDOM)]  # noqa: SIM118
        return {name.removeprefix(_RANDOM): self._files[rank].get_tensor(name) for name in names}

    def require(self, table: str, expected: Mapping[str, Tensor]) -> None:
        """Check that there is every row of a table, of the kinds, widths and types of ``expected``.

        Raises:
            MeftConfigError: naming the first that is not.
        """
        for kind, plane in expected.items():
            parts = self._parts.get((table, kind), [])
            if not parts:
                raise MeftConfigError(f"{self.folder}: {table}/{kind} is missing, where {tuple(plane.shape)} is needed")
            end = 0
            for start, stop, file, name in parts:
                shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
                if start != end or shape[0] != stop - start:
                    raise MeftConfigError(f"{self.folder}: {name} has {shape[0]} rows, and row {end} is due there")
                # Masters are fp32 either way, so that rows of one precision go on in the other.
                types = ("BF16", "F32") if kind == "compute" else (TYPES[plane.dtype],)
                if shape[1:] != list(plane.shape[1:]) or dtype not in types:
                    raise MeftConfigError(
                        f"{self.folder}: {name} has shape {tuple(shape)} and type {dtype}, where rows of shape "
                        f"{tuple(plane.shape[1:])} and type {' or '.join(types)} are needed"
                    )
                end = stop
            if end != plane.shape[0]:
                raise MeftConfigError(
                    f"{self.folder}: {table}/{kind} has {end} rows, where {plane.shape[0]} are needed"
                )


def _all_files(folder: Path) -> list[Path]:
    found = {match[0]: int(match[2]) for path in folder.glob("rows-*") if (match := _NAME.fullmatch(path.name))}
    counts = set(found.values())
    if len(counts) > 1:
        raise MeftConfigError(
            f"{folder} holds files of {' and of '.join(map(str, sorted(counts)))} ranks; remove those that do not "
            "belong there"
        )
    ranks = counts.pop() if counts else 1
    return [folder / file_name(rank, ranks) for rank in range(ranks)]
