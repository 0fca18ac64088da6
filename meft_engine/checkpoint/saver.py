"""Writes checkpoints: whole or not at all, at once or while training goes on.

A save goes through these phases, each of which all ranks finish before any begins the next: ``begin`` makes the folder
``<tag>.partial``; ``deepspeed`` writes DeepSpeed's own files into it; ``rows`` what this rank owns, and what all have
alike; ``manifest`` says what is there, once every rank has brought its part to the disk; ``place`` gives the folder its
name, in one step; ``latest`` makes it the one that a resume takes; ``prune`` removes old ones. What ends a save on its
way leaves everything that was there before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from meft_engine.checkpoint import adapter_files, folders, parameter_state, random_state, shards
from meft_engine.checkpoint.saved_adapter import CONFIG_FILE, PARAMETERS, SHARED_FILE
from meft_engine.checkpoint.snapshot import RowSnapshot, SnapshotMemory
from meft_engine.checkpoint.tensor_files import WrittenFile, write_tensors
from meft_engine.parallel.ranks import Ranks
from meft_engine.planner import host_limit

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

logger = logging.getLogger("meft_engine")


# Its writer does not say that it was the disk.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched."""


@dataclass
class _Save:
    """One checkpoint on its way, with everything of it that is not rows."""

    folder: Path
    save_latest: bool
    snapshot: RowSnapshot
    random_state: dict[str, Tensor]
    shared: dict[str, Tensor]
    shared_metadata: dict[str, str]
    description: str
    manifest: folders.Manifest

    @property
    def partial(self) -> Path:
        return partial_of(self.folder)


class CheckpointSaver:
    """Saves checkpoints of one engine.

    Args:
        engine: whose rows and ranks are saved. background: go on training while rows are written.
        snapshot_bytes: of copies of rows that change meanwhile, taken now; ``None``: a quarter of the memory that is
            free, divided among the ranks of the node.
        keep_last: how many whole checkpoints stay; ``None``: all.
    """

    def __init__(
        self, engine: MeftEngine, *, background: bool, snapshot_bytes: int | None, keep_last: int | None
    ) -> None:
        self._engine, self._keep_last = engine, keep_last
        self._ranks = _of_its_own(engine.ranks) if background else engine.ranks
        self._memory = None
        if background:
            ours = host_limit().bytes // (4 * len(engine.ranks.node))
            self._memory = SnapshotMemory(engine.row_optimizer, snapshot_bytes or ours)
            logger.info("%.2f GiB for copies of rows during a save (snapshot_bytes)", self._memory.nbytes / 2**30)
        self._thread: threading.Thread | None = None
        self._failure: CheckpointSaveError | None = None
        self.most_copied = 0
        """Bytes of copies of rows at the worst time of the last save."""

    def save(self, save_dir: Path, tag: str, *, save_latest: bool, write_deepspeed: Callable[[str], bool]) -> None:
        """Save the engine as it is, between two steps; every rank calls it.

        Args:
            write_deepspeed: writes DeepSpeed's files under a tag.

        Raises:
            CheckpointSaveError: if this save, or the one before in the background, failed on this rank.
            RanksDisagreeError: if it failed on another.
        """
        self.finish()
        folders.require_tag(tag)
        folder, engine = save_dir / tag, self._engine
        reached("begin", folder)
        with _reported(folder):
            engine.ranks.agree(lambda: self._begin(folder), f"begin {folder}")
        try:
            reached("deepspeed", folder)
            with _reported(folder):
                write_deepspeed(partial_of(folder).name)
            save = self._capture(folder, save_latest)
        except BaseException:
            self._give_up(folder)
            raise
        if self._memory is None:
            self._finish_save(save, engine.ranks)
            return
        # Not a daemon: a script that ends first waits for it.
        self._thread = threading.Thread(target=self._in_background, args=(save,), name="meft-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what has gone wrong in the background.

        Raises:
            CheckpointSaveError: once.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointSaveError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Finish, leave the ranks' group and give the memory for copies back."""
        try:
            self.finish()
        finally:
            self._memory = None
            if self._ranks is not self._engine.ranks and self._ranks.size > 1 and dist.is_initialized():
                dist.destroy_process_group(self._ranks.group)

    def _begin(self, folder: Path) -> None:
        if self._engine.ranks.rank == 0:
            folders.remove(partial_of(folder))
            (partial_of(folder) / folders.SUBFOLDER).mkdir(parents=True)

    def _capture(self, folder: Path, save_latest: bool) -> _Save:
        engine = self._engine
        optimizer = engine.row_optimizer
        shared = adapter_files.small_tensors(engine.meft_adapters, resumable=True)
        shared |= {name: history.clone() for name, history in optimizer.histories().items()}
        if parameter_state.supported(engine) is None:
            shared |= {f"{PARAMETERS}{name}": value for name, value in parameter_state.capture(engine).items()}
        manifest = folders.Manifest(
            tag=folder.name,
            global_steps=engine.global_steps,
            layout=parameter_state.layout_of(engine),
            files={},
        )
        return _Save(
            folder=folder,
            save_latest=save_latest,
            snapshot=RowSnapshot(optimizer, self._memory),
            random_state=random_state.capture(),
            shared=shared,
            shared_metadata={"groups": json.dumps(optimizer.groups_of_tables())},
            description=adapter_files.describe(engine.meft_adapters),
            manifest=manifest,
        )

    def _in_background(self, save: _Save) -> None:
        try:
            self._finish_save(save, self._ranks)
        except Exception as error:
            self._failure = CheckpointSaveError(f"{error} (it was being saved in the background)")
            self._failure.__cause__ = error

    def _finish_save(self, save: _Save, ranks: Ranks) -> None:
        started = time.monotonic()
        partial, own = save.partial, partial_of(save.folder) / folders.SUBFOLDER
        files: dict[str, WrittenFile] = {}

        def write() -> None:
            name = shards.file_name(ranks.rank, ranks.size)
            files[f"{folders.SUBFOLDER}/{name}"] = shards.write_rows(save.snapshot, save.random_state, own / name)
            if ranks.rank == 0:
                written = write_tensors(own / SHARED_FILE, save.shared, save.shared_metadata)
                files[f"{folders.SUBFOLDER}/{SHARED_FILE}"] = written
                config = folders.write_text(own / CONFIG_FILE, save.description)
                files[f"{folders.SUBFOLDER}/{CONFIG_FILE}"] = config

        def sync_deepspeed() -> None:
            found = sorted(p for p in partial.rglob("*") if p.is_file() and own not in p.parents)
            for path in found[ranks.rank :: ranks.size]:
                folders.sync(path)
                files[path.relative_to(partial).as_posix()] = folders.digest(path)

        def publish() -> None:
            save.manifest.files = {name: file for part in parts for name, file in part.items()}
            reached("manifest", save.folder)
            save.manifest.write(partial)
            latest = save.folder.parent / folders.LATEST
            if save.save_latest:
                folders.prepare_text(latest, save.folder.name)
            reached("place", save.folder)
            folders.put_in_place(partial, save.folder)
            if save.save_latest:
                reached("latest", save.folder)
                folders.put_text_in_place(latest)
            if self._keep_last is not None:
                reached("prune", save.folder)
                folders.prune(save.folder.parent, self._keep_last, save.folder)

        try:
            with _reported(save.folder):
                reached("rows", save.folder)
                ranks.agree(write, f"write its part of {save.folder}")
                ranks.agree(sync_deepspeed, f"bring DeepSpeed's part of {save.folder} to the disk")
                parts = ranks.gather_objects(files)
                ranks.agree(publish if ranks.rank == 0 else lambda: None, f"finish {save.folder}")
                reached("done", save.folder)
        except BaseException:
            self._give_up(save.folder)
            raise
        finally:
            self.most_copied = save.snapshot.most_copied
            save.snapshot.close()
        if ranks.rank == 0:
            size = sum(file.bytes for file in save.manifest.files.values())
            seconds = time.monotonic() - started
            logger.info("saved %s: %.1f MiB in %.1f s", save.folder, size / 2**20, seconds)

    def _give_up(self, folder: Path) -> None:
        """Make room again: what is half written is of no use to anybody."""
        if self._engine.ranks.rank == 0:
            folders.remove(partial_of(folder))
            (folder.parent / (folders.LATEST + folders.PARTIAL)).unlink(missing_ok=True)


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return folder.with_name(folder.name + folders.PARTIAL)


def reached(phase: str, folder: Path) -> None:
    """Say how far a save is."""
    logger.debug("%s: %s", folder, phase)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong in writing into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error)
        if any(sign in reason for sign in _TORCH_CANNOT_WRITE):
            reason = "torch.save failed, as it does on a full disk"
        elif not isinstance(error, OSError):
            raise
        raise CheckpointSaveError(
            f"the checkpoint {folder} could not be written ({reason}); what was saved before is untouched"
        ) from error


def _of_its_own(ranks: Ranks) -> Ranks:
    """The same ranks with a group in which a thread beside training may communicate, however long it takes."""
    if ranks.size == 1:
        return ranks
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return dataclasses.replace(ranks, group=group)
