"""Buffers that killed processes left in shared memory: which are removed, and which are somebody's."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meft_engine.parallel import leftovers
from meft_engine.parallel.leftovers import remove_leftovers

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing is removed without /proc")
PREFIX = f"deepspeed_allreduce_buffer_{os.getuid()}"
NAME = f"{PREFIX}_127.0.0.1_29500_0"
MAY_HOLD = leftovers._may_hold


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in shared memory, since other file systems may show other inode numbers of a mapping."""
    monkeypatch.setattr(leftovers, "_container_age", lambda: 0.0)
    monkeypatch.setattr(leftovers, "_may_hold", lambda process, size: False)  # whatever else runs on this machine
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="meft_test_", dir=where) as name:
        yield Path(name)


def make(path: Path, *, age: float = 3600.0, mode: int = 0o600) -> Path:
    """A file as the op makes it; only its modification can be made to look old, so tests accept a fresh inode."""
    path.write_bytes(b"\0" * 8192)
    path.chmod(mode)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_own_dead_files_are_removed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [NAME, f"{PREFIX}_node-7.cluster_0_1023", f"{PREFIX}___3", f"{PREFIX}_fe80::1%eth0_29500_1"]
    files = [make(folder / name) for name in names]
    with caplog.at_level(logging.INFO, logger="meft_engine"):
        assert sorted(remove_leftovers(folder, min_age=0)) == sorted(files)
        assert remove_leftovers(folder, min_age=0) == []
    assert list(folder.iterdir()) == []
    (record,) = caplog.records
    assert record.getMessage() == f"removed 4 buffers (0.0 MB) of ended processes from {folder}"


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed_allreduce_buffer",
        f"{PREFIX}_127.0.0.1_29500",
        f"{PREFIX}_127.0.0.1_29500_x",
        f"{PREFIX}_127.0.0.1_29500_0.bak",
        f"{PREFIX}_127.0.0.1_29500_0\n",
        f"my_{NAME}",
        f"deepspeed_allreduce_buffer_{os.getuid() + 1}_127.0.0.1_29500_0",
        f"sem.{NAME}",
    ],
)
def test_files_of_other_names_stay(folder: Path, name: str) -> None:
    file = make(folder / name)
    assert remove_leftovers(folder, min_age=0) == [] and file.exists()


def test_links_folders_and_other_modes_stay(folder: Path) -> None:
    target = make(folder / "precious")
    (folder / f"{PREFIX}_a_1_0").symlink_to(target)
    (folder / f"{PREFIX}_a_1_1").mkdir()
    (folder / f"{PREFIX}_a_1_2").hardlink_to(target)
    make(folder / f"{PREFIX}_a_1_3", mode=0o644)
    os.mkfifo(folder / f"{PREFIX}_a_1_4", 0o600)
    assert remove_leftovers(folder, min_age=0) == []
    assert len(list(folder.iterdir())) == 6


def test_files_that_changed_lately_stay(folder: Path) -> None:
    file = make(folder / NAME, age=3600)  # its inode is new all the same, as that of a job that starts
    assert remove_leftovers(folder) == []
    assert remove_leftovers(folder, min_age=3) == [] and file.exists()
    time.sleep(0.3)
    assert remove_leftovers(folder, min_age=0.2) == [file]


def test_container_waits_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(folder / NAME)
    monkeypatch.setattr(leftovers, "_container_age", lambda: 600.0)
    assert remove_leftovers(folder, min_age=0) == [] and file.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_other_users_stay(folder: Path) -> None:
    file = make(folder / NAME)
    os.chown(file, 65534, -1)
    assert remove_leftovers(folder, min_age=0) == [] and file.exists()


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_files_that_a_living_process_holds_stay(folder: Path, how: str) -> None:
    file = make(folder / NAME)
    code = "import mmap, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR); kept = fd\n"
    if how == "mapped":  # mmap keeps a descriptor of its own, so it is closed too
        code += "kept = mmap.mmap(fd, 0); kept[0]; os.closerange(fd, 50)\n"
    code += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        links = [os.readlink(link) for link in Path(f"/proc/{holder.pid}/fd").iterdir()]
        assert (str(file) in links) == (how == "open")
        assert remove_leftovers(folder, min_age=0) == [] and file.exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert remove_leftovers(folder, min_age=0) == [file]


def test_own_mapping_stays(folder: Path) -> None:
    file = make(folder / NAME)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapping:
        assert remove_leftovers(folder, min_age=0) == [] and mapping[0] == 0


SHARES_NOTHING = "import time; print('ready', flush=True); time.sleep(60)"
SHARES = "import mmap; shared = mmap.mmap(-1, 8192); shared[:] = bytes(8192)\n" + SHARES_NOTHING


@pytest.mark.parametrize(
    "code, size, kept", [(SHARES, 8192, True), (SHARES_NOTHING, 8192, False), (SHARES, 1 << 40, False)]
)
def test_file_that_a_process_may_hold_which_cannot_be_examined(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, size: int, kept: bool
) -> None:
    file = make(folder / NAME)
    os.truncate(file, size)
    hidden = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    examine = leftovers._held_files

    def refuse(process: Path) -> set:
        if process.name == str(hidden.pid):
            raise PermissionError
        return examine(process)

    monkeypatch.setattr(leftovers, "_held_files", refuse)
    monkeypatch.setattr(leftovers, "_may_hold", lambda at, size: at.name == str(hidden.pid) and MAY_HOLD(at, size))
    try:
        assert hidden.stdout.readline() == b"ready\n"
        assert remove_leftovers(folder, min_age=0) == ([] if kept else [file])
    finally:
        hidden.kill()
        hidden.wait()
        hidden.stdout.close()


def test_process_of_another_user_cannot_hold_a_file_of_ours(tmp_path: Path) -> None:
    status = "Uid:\t{0}\t{0}\t{0}\t{0}\nVmSize:\t 900000 kB\nRssShmem:\t 80000 kB\n"
    for uid, may in ((os.getuid(), True), (os.getuid() + 1, False)):
        (tmp_path / "status").write_text(status.format(uid))
        assert MAY_HOLD(tmp_path, 69_206_024) == may


def test_file_that_a_new_job_writes_over_meanwhile_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(folder / NAME)

    def written_over(found: dict) -> dict:
        time.sleep(0.02)  # longer than a tick of the file system's clock
        file.write_bytes(b"new")
        return found

    monkeypatch.setattr(leftovers, "_without_held", written_over)
    assert remove_leftovers(folder, min_age=0) == [] and file.exists()


def test_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none") == []
