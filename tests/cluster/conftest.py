"""What all launchers' ranks are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.training import BLOCKS, mean_losses, results, train_alone, write_configs


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, by configuration, for more steps than most runs have."""
    folder: Path = tmp_path_factory.mktemp("alone")
    train_alone(folder, write_configs(folder), steps=18)
    return {name: mean_losses(results(folder, name)) for name in BLOCKS}
