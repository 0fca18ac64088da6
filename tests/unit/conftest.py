"""Which implementation of the passes over rows a test runs."""

from __future__ import annotations

import os
import shutil
from types import ModuleType

import pytest

from meft_kernels import rows as in_torch
from meft_kernels.cpu import native


@pytest.fixture(scope="session")
def compiled_passes() -> ModuleType:
    """The compiled ones. Where there is a compiler they have to be there: a build that fails is no reason to skip."""
    if native.library() is None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("no compiler here")
        pytest.fail("the row kernels do not compile")
    return native


@pytest.fixture(params=["compiled", "pytorch"])
def each_passes(request) -> ModuleType:
    """The compiled ones and those in PyTorch, in turn."""
    return request.getfixturevalue("compiled_passes") if request.param == "compiled" else in_torch
