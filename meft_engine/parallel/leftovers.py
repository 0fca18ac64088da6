"""What killed processes leave in shared memory."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from pathlib import Path

logger = logging.getLogger("meft_engine")

# The pid namespace of the machine itself has this number in every Linux.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


def remove_leftovers(folder: Path = Path("/dev/shm"), *, min_age: float = 10.0) -> list[Path]:
    """Remove the buffers of DeepSpeed's all_reduce over shared memory that belong to no living process.

    That op makes a file of 69 MB for each rank of a CPU run, mode 600, and never removes it; the name is
    ``deepspeed_allreduce_buffer_<uid>_<address>_<port>_<rank>``. It makes nothing else, such as semaphores. A file goes
    only if it has that name and mode, is ours, is no link, has not changed for ``min_age`` seconds (a rank that starts
    creates its file, or writes over an old one, before the others open it), and no living process has it open or
    mapped. Where that cannot be found out, it stays: without /proc, beside a process of ours that cannot be examined
    and is large enough, and, in a container, for ten minutes, since processes of other containers are out of sight.

    Returns:
        The files that were removed.
    """
    if not Path("/proc/self/maps").exists():
        return []
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return []
    removed, size = [], 0
    try:
        found = _candidates(directory, max(min_age, _container_age()))
        found = _without_held(found) if found else {}
        for name, before in found.items():
            try:
                now = os.lstat(name, dir_fd=directory)
                # A job that began meanwhile has written over it.
                if (now.st_ino, now.st_ctime_ns) == (before.st_ino, before.st_ctime_ns):
                    os.unlink(name, dir_fd=directory)
                    removed.append(Path(folder) / name)
                    size += now.st_blocks * 512
            except OSError:  # gone, or not to be removed
                continue
    finally:
        os.close(directory)
    if removed:
        logger.info("removed %d buffers (%.1f MB) of ended processes from %s", len(removed), size / 1e6, folder)
    return removed


def _candidates(directory: int, min_age: float) -> dict[str, os.stat_result]:
    """Files that have the op's name and mode, are ours, and have not changed for so many seconds."""
    pattern = re.compile(rf"deepspeed_allreduce_buffer_{os.getuid()}_[\w.:%-]*_\d*_\d+", re.ASCII)
    found = {}
    for name in os.listdir(directory):
        if not pattern.fullmatch(name):
            continue
        try:
            about = os.lstat(name, dir_fd=directory)
        except OSError:
            continue
        ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) == 0o600
        if ours and about.st_nlink == 1 and time.time() - max(about.st_mtime, about.st_ctime) >= min_age:
            found[name] = about
    return found


def _container_age() -> float:
    """Seconds after which a file is nobody's start any more, where some processes may be out of sight."""
    try:
        return 0.0 if os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE else 600.0
    except OSError:
        return 600.0


def _without_held(found: dict[str, os.stat_result]) -> dict[str, os.stat_result]:
    """Those that no living process has open or mapped."""
    free = dict(found)
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            held = _held_files(process)
        except PermissionError:
            free = {name: about for name, about in free.items() if not _may_hold(process, about.st_size)}
            continue
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        free = {name: about for name, about in free.items() if not {name, (about.st_dev, about.st_ino)} & held}
    return free


def _held_files(process: Path) -> set[tuple[int, int] | str]:
    """Device and inode of what a process has mapped or open; of mappings the name too.

    On some file systems, mappings show another device than ``stat`` does.
    """
    held: set[tuple[int, int] | str] = set()
    for line in (process / "maps").read_text(errors="replace").splitlines():
        _, _, _, device, inode, *path = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        held.add((os.makedev(major, minor), int(inode)))
        held.update(Path(each.removesuffix(" (deleted)")).name for each in path)
    for entry in (process / "fd").iterdir():
        try:
            about = entry.stat()  # of what the process has open, whatever has become of its name
        except (FileNotFoundError, ProcessLookupError):
            continue
        held.add((about.st_dev, about.st_ino))
    return held


def _may_hold(process: Path, size: int) -> bool:
    """Whether a process that cannot be examined may have a file of ours of so many bytes mapped."""
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    if str(os.getuid()) not in status.get("Uid", "").split():
        return False  # mode 600
    # Agents that hold keys, for instance, are not to be examined either; but they are small, or share no memory.
    shared, whole = (int(status.get(field, "0 kB").split()[0]) for field in ("RssShmem", "VmSize"))
    return shared > 0 and whole * 1024 >= size
