"""Settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.families_table import FamiliesTable

# Set before anything asks the hub: the tests neither need nor wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tensors here are tiny: on a busy machine, threads would wait for each other longer than they work.
torch.set_num_threads(1)

# The same examples in every run; on a busy machine an example may take any time.
hypothesis.settings.register_profile("meft", derandomize=True, deadline=None, database=None, max_examples=100)
hypothesis.settings.load_profile("meft")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table of families and behaviours goes; without it none is written."""
    parser.addoption(
        "--late-device",
        action="store_true",
        help="place the models on a device whose copies are as late as they may be",
    )
    parser.addoption("--families-table", type=Path, help="write which behaviour holds for which family of models")


def pytest_configure(config: pytest.Config) -> None:
    """Listen to the tests if a table is asked for; play a device if that is."""
    if config.getoption("--late-device"):
        from tests.late_copies import use_late_device

        use_late_device(pytest.MonkeyPatch().setattr)
    path = config.getoption("--families-table")
    if path is not None:
        config.pluginmanager.register(FamiliesTable(path))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global random state, in whatever order the tests run."""
    torch.manual_seed(0)
