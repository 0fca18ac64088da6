"""Memory that the ranks of a node share: what is in it, and whose it may be."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from meft_engine.parallel import arena
from meft_engine.parallel.arena import NodeMemory, bytes_taken
from meft_engine.parallel.ranks import Ranks

SHAPES = [((3, 5), torch.bfloat16), ((7,), torch.int32), ((1000, 33), torch.float32)]


@pytest.fixture(autouse=True)
def _without_garbage() -> None:
    """What other tests have left must not go while this one counts."""
    gc.collect()


def mapped() -> set[str]:
    """Memories that this process maps, by inode: advice to part of a mapping gives it several lines."""
    with open("/proc/self/maps") as maps:
        return {line.split()[4] for line in maps if "memfd:meft-rows" in line}


def test_tables_are_zeros_of_their_own_and_go_with_the_last_of_them():
    before = mapped()
    memory = NodeMemory(Ranks(), bytes_taken(SHAPES))
    tables = [memory.take(shape, dtype, [slice(0, shape[0])]) for shape, dtype in SHAPES]
    for number, (table, (shape, dtype)) in enumerate(zip(tables, SHAPES, strict=True)):
        assert table.shape == torch.Size(shape) and table.dtype == dtype and not table.any()
        assert table.data_ptr() % 64 == 0
        table.fill_(number + 1)
    assert all(bool((table == number + 1).all()) for number, table in enumerate(tables))
    assert len(mapped() - before) == 1
    with pytest.raises(MemoryError, match="bytes of shared memory were asked for"):
        memory.take((4096,), torch.float32)
    del memory
    assert len(mapped() - before) == 1
    del tables, table
    gc.collect()
    assert mapped() == before


def test_it_has_no_name_and_its_descriptor_goes_with_it():
    shm, descriptors = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    memory = NodeMemory(Ranks(), 1 << 20)
    assert set(os.listdir("/dev/shm")) == shm
    # Python's mmap keeps one of its own.
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    del memory
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_another_process_sees_what_is_written():
    """Both in processes of their own: this one may be too large to be forked."""
    script = """
import os, torch
from meft_engine.parallel.arena import NodeMemory
from meft_engine.parallel.ranks import Ranks
table = NodeMemory(Ranks(), 1 << 16).take((8,), torch.int64)
child = os.fork()
if child == 0:
    table[3] = 42
    os._exit(0)
os.waitpid(child, 0)
print(table.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[0, 0, 0, 42, 0, 0, 0, 0]", done.stderr


@pytest.fixture
def descriptor() -> Iterator[int]:
    made = os.memfd_create("meft-rows", os.MFD_CLOEXEC)
    os.fchmod(made, 0o600)
    os.ftruncate(made, 4096)
    yield made
    os.close(made)


def test_what_fits_is_opened(descriptor):
    found = arena._open_of(os.getpid(), descriptor, 4096)
    assert os.path.samestat(os.fstat(found), os.fstat(descriptor)) and found != descriptor
    os.close(found)


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o700])
def test_memory_that_is_open_to_others_is_refused(mode, descriptor):
    os.fchmod(descriptor, mode)
    with pytest.raises(PermissionError, match=f"has mode {mode:o}"):
        arena._open_of(os.getpid(), descriptor, 4096)


def test_memory_of_another_size_is_refused(descriptor):
    with pytest.raises(PermissionError, match="and 4096 bytes, where user .* and 8192 bytes are expected"):
        arena._open_of(os.getpid(), descriptor, 8192)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_memory_of_another_user_is_refused(descriptor):
    os.fchown(descriptor, 65534, -1)
    left = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        arena._open_of(os.getpid(), descriptor, 4096)
    assert len(os.listdir("/proc/self/fd")) == left
