"""`host_zeros`: what it pins, asks for and gives back. CUDA is played by a record of calls."""

from __future__ import annotations

import gc
import logging
import mmap
from pathlib import Path

import pytest
import torch

from meft_engine.offload import memory
from meft_engine.offload.memory import host_zeros


class Cuda:
    """Stands for ``torch.cuda.cudart()``; whatever is unregistered is read first, while it has to be there."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.calls, self.live = error, [], {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("register", address, size, flags))
        if self.error == 0:
            self.live[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address, is_mapped(address, self.live.pop(address))))
        return 0


def is_mapped(address: int, size: int) -> bool:
    """Whether all of a range belongs to the process."""
    at = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= at < last:
            at = last
    return at >= address + size


@pytest.fixture
def cuda(request, monkeypatch) -> Cuda:
    made = Cuda(getattr(request, "param", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list mappings")
@pytest.mark.parametrize("huge_pages", [False, True])
@pytest.mark.parametrize("shape, dtype", [((1, 1), torch.bfloat16), ((1000, 33), torch.float32), ((7,), torch.int32)])
def test_pinned_memory_is_registered_whole_and_unregistered_once_before_it_goes(cuda, shape, dtype, huge_pages):
    tensor = host_zeros(shape, dtype, pin_memory=True, huge_pages=huge_pages)
    ((kind, address, size, flags),) = cuda.calls
    assert (kind, flags) == ("register", 0)
    assert address % mmap.PAGESIZE == 0
    assert address <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= address + size
    # No page that is not the tensor's.
    assert size < tensor.nbytes + mmap.PAGESIZE and is_mapped(address, size)
    view = tensor.view(-1)[-1:]
    del tensor
    gc.collect()
    assert len(cuda.calls) == 1 and view.tolist() == [0]
    del view
    gc.collect()
    assert cuda.calls[1:] == [("unregister", address, True)]


@pytest.mark.parametrize("cuda", [2], indirect=True)
def test_what_cannot_be_pinned_is_used_as_it_is_after_a_warning(cuda, caplog):
    with caplog.at_level(logging.WARNING, logger="meft_engine"):
        tensor = host_zeros((1 << 10, 1 << 10), torch.float32, pin_memory=True)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "0.00 GiB" in message and "CUDA error 2" in message and "offload.pin_memory = false" in message
    tensor.fill_(3)
    assert tensor.sum() == 3 << 20
    del tensor
    gc.collect()
    assert [call[0] for call in cuda.calls] == ["register"]


def test_nothing_is_pinned_unasked_or_without_a_gpu(cuda, monkeypatch):
    host_zeros((3, 5), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    host_zeros((3, 5), torch.float32, pin_memory=True)
    gc.collect()
    assert cuda.calls == []


@pytest.mark.parametrize("huge_pages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.int32])
def test_it_gives_zeros_that_can_be_written(dtype, huge_pages):
    for shape in ((1,), (3, 5), (1 << 11, 515)):
        tensor = host_zeros(shape, dtype, huge_pages=huge_pages)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(1)
        assert tensor.view(-1)[-1] == 1 == tensor.view(-1)[0]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no transparent huge pages")
def test_huge_pages_are_asked_for_where_they_are_wanted(monkeypatch):
    asked = []

    class Recording(memory.Mapping):
        def madvise(self, option: int) -> None:
            asked.append((option, len(self)))
            super().madvise(option)

    monkeypatch.setattr(memory, "Mapping", Recording)
    host_zeros((100, 7), torch.float32, huge_pages=False)
    assert asked == []
    host_zeros((100, 7), torch.float32)
    ((option, size),) = asked
    assert option == mmap.MADV_HUGEPAGE and size >= 2800


def test_tables_one_after_the_other_begin_at_different_places_of_their_pages():
    """Four of them, as a table and its moments are, at all times."""
    tensors = [host_zeros((9, 512), torch.float32) for _ in range(13)]
    offsets = [tensor.data_ptr() % mmap.PAGESIZE for tensor in tensors]
    for first in range(10):
        assert len(set(offsets[first : first + 4])) == 4
    assert all(offset % 64 == 0 for offset in offsets)
