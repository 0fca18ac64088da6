"""Checkpoint folders: written under another name, exchanged in one step, told apart by their manifest.

<save_dir>/latest                    the tag that a resume takes
<save_dir>/<tag>/meft/manifest.json  sizes and SHA-256 of all files of the checkpoint, written last
<save_dir>/<tag>.partial             a save that is not done; never loaded
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from meft_engine.checkpoint.tensor_files import WrittenFile
from meft_engine.config import MeftConfigError

SUBFOLDER = "meft"
"""Where our files are, in a folder that holds more than them."""
PARTIAL = ".partial"
LATEST = "latest"
MANIFEST = f"{SUBFOLDER}/manifest.json"
_FORMAT = 1
_PIECE = 1 << 24


class TornCheckpointError(MeftConfigError):
    """A checkpoint is not what was saved; the message names the file."""


@dataclass
class Manifest:
    """What a checkpoint consists of."""

    tag: str
    global_steps: int
    layout: dict[str, int | str]
    """By which DeepSpeed's own files are bound: the ZeRO stage, the number of ranks, the precision."""
    files: dict[str, WrittenFile]
    """By their paths below the checkpoint's folder."""

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, as its last file."""
        content = {"format": _FORMAT, **asdict(self)}
        write_text(folder / MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        TornCheckpointError: if it is missing, cannot be read, or names files outside the checkpoint.
    """
    path = folder / MANIFEST
    for part in (path, path.parent):
        if part.is_symlink():
            raise TornCheckpointError(f"{part} is a symbolic link, which a checkpoint never holds; do not use it")
    if not path.is_file():
        raise TornCheckpointError(f"{path} is missing, so {folder} is no whole checkpoint")
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise MeftConfigError(
                f"{path} has format = {content['format']!r}, and this version reads {_FORMAT}; load it with the "
                "version of meft_engine that wrote it"
            )
        files = {str(name): WrittenFile(int(f["bytes"]), str(f["sha256"])) for name, f in content["files"].items()}
        found = Manifest(
            tag=str(content["tag"]),
            global_steps=int(content["global_steps"]),
            layout=dict(content["layout"]),
            files=files,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, MeftConfigError):
            raise
        raise TornCheckpointError(f"{path} cannot be read ({error}), so {folder} is no whole checkpoint") from None
    for name in found.files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
            raise TornCheckpointError(f"{path} names {name!r}, which is outside the checkpoint; do not use it")
    return found


def require_whole(folder: Path, files: Mapping[str, WrittenFile], names: Iterable[str]) -> None:
    """Check that files are as they were saved.

    Args:
        files: by their names below the folder. names: of those to check.

    Raises:
        FileNotFoundError: naming a file that is missing.
        TornCheckpointError: naming a file that is not what was saved.
    """
    for name in names:
        expected, path = files[name], folder / name
        linked = next(
            (p for p in (path, *path.parents) if p != folder and folder in p.parents and p.is_symlink()), None
        )
        if linked is not None:
            raise TornCheckpointError(f"{linked} is a symbolic link, which a checkpoint never holds; do not use it")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so nothing can be loaded from {folder}")
        if path.stat().st_size != expected.bytes:
            raise TornCheckpointError(
                f"{path} has {path.stat().st_size} bytes and was saved with {expected.bytes}; load another checkpoint"
            )
        if digest(path).sha256 != expected.sha256:
            raise TornCheckpointError(f"{path} is not what was saved (its SHA-256 differs); load another checkpoint")


def find(load_dir: Path, tag: str | None) -> Path:
    """The folder of a checkpoint: of the tag, or of the one that ``latest`` names.

    Raises:
        FileNotFoundError: if there is none, naming the newest whole one (DeepSpeed alone would start from scratch in
            silence).
    """
    latest = load_dir / LATEST
    if tag is None:
        if not latest.is_file():
            raise FileNotFoundError(f"{latest} is missing; {_advice(load_dir)}")
        tag = latest.read_text().strip()
        if not _is_tag(tag) or not (load_dir / tag).is_dir():
            raise FileNotFoundError(f"{latest} names {tag!r}, which is no folder there; {_advice(load_dir)}")
        if not (load_dir / tag / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{latest} names {tag!r}, which has no {MANIFEST} and so is no whole checkpoint; {_advice(load_dir)}"
            )
    folder = load_dir / tag
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder / MANIFEST} is missing, so there is no checkpoint; {_advice(load_dir)}")
    return folder


def whole_ones(load_dir: Path) -> list[Path]:
    """Checkpoints with a manifest whose files have their sizes, the one of most steps last. Contents are not read."""
    found = []
    for folder in load_dir.iterdir() if load_dir.is_dir() else []:
        try:
            manifest = read_manifest(folder)
        except (MeftConfigError, OSError):
            continue
        sizes = {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file()}
        if sizes == {name: file.bytes for name, file in manifest.files.items()}:
            # A save that ended between two renames lies under another name, and is whole all the same.
            found.append((manifest.global_steps, (folder / MANIFEST).stat().st_mtime, folder))
    return [folder for *_, folder in sorted(found)]


def digest(path: Path) -> WrittenFile:
    """Size and SHA-256 of a file."""
    found, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found.update(piece)
            size += len(piece)
    return WrittenFile(size, found.hexdigest())


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a file that is there whole or not at all, and bring it to the disk."""
    prepare_text(path, text)
    return put_text_in_place(path)


def prepare_text(path: Path, text: str) -> None:
    """Bring a file to the disk under another name, after which :func:`put_text_in_place` needs no room."""
    with path.with_name(path.name + PARTIAL).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def put_text_in_place(path: Path) -> WrittenFile:
    """Give a prepared file its name."""
    os.replace(path.with_name(path.name + PARTIAL), path)
    sync_folder(path.parent)
    return digest(path)


def sync(path: Path) -> None:
    """Bring a file that somebody else wrote to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; some file systems cannot, and need not."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a whole checkpoint its name; one that had it before is there until then, and removed afterwards."""
    for path in sorted(partial.rglob("*")):
        if path.is_dir():
            sync_folder(path)
    sync_folder(partial)
    if not folder.exists():
        os.rename(partial, folder)
    elif _exchange(partial, folder):
        remove(partial)
    else:  # a file system that cannot: for a moment neither has the name, and both are whole
        old = folder.with_name(folder.name + ".old")
        remove(old)
        os.rename(folder, old)
        try:
            os.rename(partial, folder)
        except OSError:
            os.rename(old, folder)
            raise
        remove(old)
    sync_folder(folder.parent)


def prune(save_dir: Path, keep: int, newest: Path) -> list[Path]:
    """Remove all but the ``keep`` newest whole checkpoints; ``newest``, which has just been saved, is one of them."""
    others = [folder for folder in whole_ones(save_dir) if folder != newest and not folder.name.endswith(PARTIAL)]
    surplus = others[: max(0, len(others) - (keep - 1))]
    for folder in surplus:
        remove(folder)
    return surplus


def remove(folder: Path) -> None:
    """Remove a checkpoint or what is left of one; half of one is never taken for a whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=not folder.exists())


def require_tag(tag: str) -> None:
    """Refuse a tag that is no name of a folder in the save folder.

    Raises:
        ValueError: naming it.
    """
    if not _is_tag(tag) or tag.endswith((PARTIAL, ".old")):
        raise ValueError(
            f"tag = {tag!r} cannot name a checkpoint; use a plain name without slashes, which does not end in "
            f"{PARTIAL!r} or '.old'"
        )


def _advice(load_dir: Path) -> str:
    whole = whole_ones(load_dir)
    if not whole:
        return f"there is no whole checkpoint in {load_dir}"
    return f"the newest whole checkpoint there is {whole[-1].name!r}: load it with tag={whole[-1].name!r}"


def _is_tag(tag: str) -> bool:
    return bool(tag) and tag not in (".", "..") and os.path.basename(tag) == tag


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux: renameat2 with RENAME_EXCHANGE)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(at, os.fsencode(one), at, os.fsencode(other), exchange) == 0
