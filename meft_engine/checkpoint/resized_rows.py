"""Rows of a checkpoint in another number: those that were saved, in their new places, and new ones beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.adapter.initialize import initial_keys, seed_of_layer
from meft_engine.checkpoint import shards
from meft_engine.checkpoint.folders import TornCheckpointError
from meft_engine.checkpoint.saved_adapter import SavedAdapter
from meft_engine.checkpoint.snapshot import Block
from meft_engine.checkpoint.tensor_files import WrittenFile
from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.parallel.sharding import owned_rows
from meft_kernels import planes

NEW = -1
"""In the place of a former row's number."""
_KINDS = ("compute", "low", "step", "exp_avg", "exp_avg_sq")


class ResizedRows:
    """The resized rows, a few at a time; besides them, the new keys of one FFN are in memory.

    Args:
        saved: a checkpoint that :func:`require_rows` has accepted. attached: its adapters, for their initialisation.
        sources: by the FFN's portable name, [rows] int64: which former row each row is, ascending, or ``NEW``.
    """

    def __init__(self, saved: SavedAdapter, attached: AttachedAdapters, sources: Mapping[str, Tensor]) -> None:
        self._saved, self._attached, self._sources = saved, attached, sources
        self._samples = {table.name: _samples(saved, table) for table in attached.tables()}
        self._owned = slice(0, 0)
        self._new_keys: tuple[str, Tensor] | None = None
        self.ranks = saved.shards.ranks
        """How many files there are, each with the rows that its rank is going to own."""

    def write(self, rank: int, path: Path) -> WrittenFile:
        """Write the file of one rank, with the random state that it had."""
        rows = len(next(iter(self._sources.values())))
        experts = self._attached.config.adapter.resolved_num_experts
        self._owned = owned_rows(rows, rows // experts, self.ranks)[rank]
        return shards.write_rows(self, self._saved.shards.random_state(rank), path)

    def blocks(self) -> Iterator[Block]:
        """Of the rank whose file is being written."""
        for table in self._attached.tables():
            row_bytes = max(sample.nbytes for sample in self.kinds(table).values())
            for rows in pieces(self._owned, row_bytes):
                yield Block(table, rows)

    def kinds(self, table: PartiallyOffloadedTensor) -> dict[str, Tensor]:
        """By kind, a row [1, …] of what was saved."""
        return self._samples[table.name]

    def take(self, block: Block) -> dict[str, Tensor]:
        """A block's rows by kind."""
        table, (ffn, part) = block.table.name, block.table.name.rsplit("/", 1)
        source = self._sources[ffn][block.rows]
        kept = source != NEW
        found = {}
        for kind, sample in self.kinds(block.table).items():
            found[kind] = torch.zeros(len(source), *sample.shape[1:], dtype=sample.dtype)
            if kept.any():
                found[kind][kept] = self._former(table, kind, source[kept])
        found["step"][~kept] = self._first_step(table)
        if part == "keys" and not kept.all():
            before = int((self._sources[ffn][: block.rows.start] == NEW).sum())
            keys = self._keys(ffn)[before : before + int((~kept).sum())]
            if "low" in found:
                found["compute"][~kept], found["low"][~kept] = planes.split(keys)
            else:
                found["compute"][~kept] = keys
        return found

    def _former(self, table: str, kind: str, rows: Tensor) -> Tensor:
        """[n, …]: some former rows, ascending; what lies between them is not held."""
        parts = []
        for part in pieces(slice(int(rows[0]), int(rows[-1]) + 1), self._samples[table][kind].nbytes):
            wanted = rows[(rows >= part.start) & (rows < part.stop)]
            if wanted.numel():
                parts.append(self._saved.shards.read(table, kind, part)[wanted - part.start])
        return torch.cat(parts)

    def _first_step(self, table: str) -> int:
        """Where the mode is "dense_equivalent", new rows are current: they have nothing to make up for."""
        if self._attached.config.optimizer.mode == "lazy":
            return 0
        return self._saved.shape(f"group{self._saved.groups[table]['index']}/history")[0]

    def _keys(self, ffn: str) -> Tensor:
        """[rows - former, d] float32: those that an adapter of the new size starts with and the former did not."""
        if self._new_keys is None or self._new_keys[0] != ffn:
            self._new_keys = None  # before the next are made
            config = self._attached.config.adapter
            names = list(self._attached.adapters)
            index = next(i for i, name in enumerate(names) if self._attached.adapters[name].name == ffn)
            weight, seed = self._attached.ffns[names[index]].gate_weight, seed_of_layer(config.seed, index)
            keys = initial_keys(weight, len(self._sources[ffn]), config.init_keys, seed)
            self._new_keys = ffn, keys[config.rows :].clone()
        return self._new_keys[1]


def require_rows(saved: SavedAdapter, attached: AttachedAdapters, layout: Mapping[str, int | str]) -> None:
    """Check that every row is there with all of its state.

    Args:
        layout: what the manifest says of the run.

    Raises:
        MeftConfigError: naming the first that is missing.
    """
    if saved.shards.ranks != layout["ranks"]:
        raise TornCheckpointError(
            f"{saved.folder} has files of {saved.shards.ranks} ranks and was saved by {layout['ranks']}; load another "
            "checkpoint"
        )
    for table in attached.tables():
        samples = _samples(saved, table)
        for kind in _KINDS:
            if kind not in samples and not (kind == "low" and samples["compute"].dtype == torch.float32):
                raise TornCheckpointError(f"{saved.folder}: {table.name}/{kind} is missing; load another checkpoint")
        whole = {kind: sample.expand(table.rows, *sample.shape[1:]) for kind, sample in samples.items()}
        saved.shards.require(table.name, whole)


def _samples(saved: SavedAdapter, table: PartiallyOffloadedTensor) -> dict[str, Tensor]:
    first = slice(0, 1)
    found = [kind for kind in _KINDS if saved.shards.has(table.name, kind)]
    return {kind: saved.shards.read(table.name, kind, first) for kind in found}
