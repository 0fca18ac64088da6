"""Which implementation of the passes over rows a test runs."""

from __future__ import annotations

import os
import shutil
from types import ModuleType

import pytest

from meft_kernels import rows as in_torch
from meft_kernels.cpu import build, native_rows


@pytest.fixture(scope="session")
def compiled_passes() -> ModuleType:
    """The compiled ones. Where there is a compiler they have to be there: a build that fails is no reason to skip."""
    if build.library() is None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("no compiler here")
        pytest.fail("the CPU kernels do not compile")
    return native_rows


@pytest.fixture(params=["compiled", "pytorch"])
def each_passes(request) -> ModuleType:
    """The compiled ones and those in PyTorch, in turn."""
    return request.getfixturevalue("compiled_passes") if request.param == "compiled" else in_torch
