"""Which implementation of the passes over tokens is taken, and what is said where the fastest cannot be."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from meft_kernels import dispatch, sparse
from meft_kernels.cpu import build, native_sparse

check = pytest.importorskip("meft_kernels.triton.check", reason="needs Triton", exc_type=ImportError)
passes = pytest.importorskip("meft_kernels.triton.passes", reason="needs Triton", exc_type=ImportError)

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.delenv("MEFT_TOKEN_PASSES", raising=False)
    dispatch._triton_works.cache_clear()
    yield
    dispatch._triton_works.cache_clear()


def test_a_gpu_on_which_the_kernels_work_gets_them(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(check, "fault", asked.append)
    with caplog.at_level(logging.WARNING, logger="meft_engine"):
        assert dispatch.token_passes(GPU) is dispatch.token_passes(GPU) is passes
    assert asked == [GPU] and not caplog.records


def test_a_gpu_on_which_they_do_not_gets_pytorch_and_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(check, "fault", lambda device: "the output differs from what PyTorch finds")
    with caplog.at_level(logging.WARNING, logger="meft_engine"):
        assert dispatch.token_passes(GPU) is dispatch.token_passes(GPU) is sparse
    assert [record.getMessage() for record in caplog.records] == [
        "MEFT computes on cuda in PyTorch, which is slower than its Triton kernels: the output differs from what "
        "PyTorch finds"
    ]


def test_a_gpu_without_triton_gets_pytorch(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="meft_engine"):
        assert dispatch.token_passes(GPU) is sparse
    assert "Triton is not installed" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_a_device_raises_is_the_reason():
    assert check.fault(GPU)


def test_a_cpu_gets_the_compiled_passes_or_pytorch(monkeypatch):
    for library, expected in ((object(), native_sparse), (None, sparse)):
        monkeypatch.setattr(build, "library", lambda library=library: library)
        assert dispatch.token_passes(CPU) is expected


def test_one_may_be_asked_for(monkeypatch):
    for asked, expected in (("triton", passes), ("torch", sparse)):
        monkeypatch.setenv("MEFT_TOKEN_PASSES", asked)
        assert dispatch.token_passes(CPU) is dispatch.token_passes(GPU) is expected
    monkeypatch.setenv("MEFT_TOKEN_PASSES", "cuda")
    with pytest.raises(ValueError, match='MEFT_TOKEN_PASSES = "cuda" is none of'):
        dispatch.token_passes(CPU)
