"""Sweeps whose trainings are played by a script, without DeepSpeed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import launcher
import pytest

from tests.sweep_materials import write_sweep

FAKE = Path(__file__).parent / "scripts" / "fake_trainer.py"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is left out: its options come before the script's, which minds none of them."""
    monkeypatch.setattr(launcher, "deepspeed_command", lambda *options: [sys.executable, str(FAKE), *options])


def write_fake(folder: Path, arguments: dict[str, Any] | None = None, **sections: Any) -> Path:
    """The YAML of a sweep over the script, and the JSON that it names."""
    config = folder / "ds.json"
    config.write_text(json.dumps({"meft": {"adapter": {"rows": 64}}, "zero_optimization": {"stage": 0}}))
    base = {"config": str(config), "script": str(FAKE), "arguments": arguments or {}}
    return write_sweep(folder / "sweep.yaml", {"base": base, "resources": {"gpus": 0}, **sections})
