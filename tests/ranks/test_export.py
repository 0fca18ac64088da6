"""What two ranks export, under every ZeRO stage, gives a plain model the logits of the engine."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES
from tests.ranks.worlds import start_world, wait_for_world

pytestmark = pytest.mark.ranks


def test_every_family(tmp_path, subtests):
    wait_for_world(tmp_path, start_world(tmp_path, 2, ["-m", "tests.ranks.exporting", str(tmp_path)]), 600)
    for name in FAMILIES:
        with subtests.test(name):
            logits = torch.load(tmp_path / f"{name}.pt")
            torch.testing.assert_close(logits["found"], logits["own"], rtol=0, atol=1e-6)
            assert (logits["own"] - logits["base"]).abs().max() > 1e-2
