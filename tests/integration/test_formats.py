"""What was saved in a format is read for as long as the format is: files that were made once and never are again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import meft_engine
from meft_engine.checkpoint.saved_adapter import FORMAT
from tests.assets.make import ADAM, block
from tests.integration.engines import batch, build_engine, train_step

ASSETS = Path(__file__).parents[1] / "assets"
FORMATS = sorted(ASSETS.glob("format-*"))


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def folder(request, tmp_path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "saved"))


def base(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def test_there_is_one_of_the_present_format():
    assert f"format-{FORMAT}" in [path.name for path in FORMATS]
    assert sum(file.stat().st_size for path in FORMATS for file in path.rglob("*")) < 1e6


@pytest.mark.parametrize("what", ["adapter", "checkpoint"])
def test_the_model_gives_the_logits_of_then(what, folder):
    model = meft_engine.load_adapter(base(folder, torch.bfloat16), folder / what).eval()
    expected = load_file(folder / "expected.safetensors")["logits"]
    with torch.no_grad():
        found = model(batch(9), use_cache=False).logits.float()
    # Another machine's bf16 may round otherwise.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert (found - expected).abs().mean() < 0.01


@pytest.mark.parametrize("stage", [0, 2])
def test_training_goes_on(stage, folder):
    """By DeepSpeed's own files, and under another stage without them."""
    engine = build_engine(base(folder), block(), stage=stage, bf16=True, adam=ADAM)
    _, client = engine.load_checkpoint(str(folder / "checkpoint"))
    assert client["note"] == "kept" and engine.global_steps == 3
    expected = load_file(folder / "expected.safetensors")["losses"]
    losses = torch.tensor([float(train_step(engine, [batch(step)])) for step in range(3, 6)])
    torch.testing.assert_close(losses, expected, rtol=0, atol=0.1)
