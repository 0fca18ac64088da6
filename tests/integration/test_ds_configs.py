"""One optimizer step with every configuration of ds_configs/, with the sizes alone made those of a tiny model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import meft_engine
from tests.config_sizes import FOLDER, read
from tests.families import FAMILIES
from tests.integration.engines import batch, train_step

FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
SIZES = {"rows": 128, "num_experts": 16}
FILLED_IN = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
"""What the HF Trainer makes of "auto"."""


def scaled(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the rows, the cap and the batch of a tiny model, and "auto" filled in."""
    small = copy.deepcopy(config)
    small.pop("train_batch_size", None)
    small.update(FILLED_IN)
    if small.get("bf16", {}).get("enabled") == "auto":
        small["bf16"]["enabled"] = False
    block = small["meft"]
    block["adapter"].update({name: SIZES[name] for name in SIZES if name in block["adapter"]})
    if "cap" in block.get("active_rows", {}):
        block["active_rows"]["cap"] = 96
    return small


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("name", FILES)
def test_it_takes_a_step(name, family):
    config = scaled(read(name))
    model = FAMILIES[family].model()
    optimizer = None if "optimizer" in config else torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = meft_engine.initialize(model=model, config=copy.deepcopy(config), optimizer=optimizer)[0]
    try:
        assert engine.zero_optimization_stage() == config["zero_optimization"]["stage"]
        resolved = engine.meft_config.model_dump()
        for section, fields in config["meft"].items():
            assert fields.items() <= resolved[section].items()
        loss = train_step(engine, [batch(i, size=2) for i in range(2)])
        assert math.isfinite(loss) and engine.global_steps == 1
        engine.synchronize_rows()
        report = engine.meft_report()
        cap = config["meft"].get("active_rows", {}).get("cap", report["rows"])
        assert 0 < report["touched_share"] <= cap / report["rows"]
        assert 0 < report["kept_mass"] <= 1
        for adapter in engine.meft_adapters.adapters.values():
            moved = adapter.values.master.any(1).sum()  # values start at zero
            assert 0 < moved <= 2 * cap
    finally:
        engine.destroy()
