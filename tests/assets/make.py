"""Makes the checkpoint and the adapter that stand for a format: ``python -m tests.assets.make tests/assets/format-n``.

Run it once when a format is new, and keep what it wrote for as long as the format is read: what users have saved does
not change with the code either.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tests.integration.conftest  # noqa: F401 - what DeepSpeed needs, before it is imported

import torch  # isort: skip
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import meft_engine
from tests.families import fill_values, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, train_step

ADAM = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
BLOCK = {"center_inputs": True}
MODE = {"mode": "dense_equivalent", "moments_dtype": "bf16"}


def block() -> dict:
    """With most of what a checkpoint may hold."""
    return tiny_block(BLOCK, optimizer=MODE, router={"balance": "bias", "balance_coef": 0.01})


def main(folder: Path) -> None:
    """Base model, checkpoint after three steps, exported adapter, and what came of them when they were made."""
    torch.manual_seed(0)
    base = tiny_llama(num_hidden_layers=2)
    base.save_pretrained(folder / "base")
    engine = build_engine(base, block(), stage=2, bf16=True, adam=ADAM)
    fill_values(engine.meft_adapters)
    for step in range(3):
        train_step(engine, [batch(step)])
    engine.save_checkpoint(str(folder / "checkpoint"), client_state={"note": "kept"})
    engine.save_adapter(folder / "adapter")
    # The engine's own keys may still miss steps in this mode; those of an adapter never do.
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    meft_engine.load_adapter(plain, folder / "adapter").eval()
    with torch.no_grad():
        found = {"logits": plain(batch(9), use_cache=False).logits.float()}
    found["losses"] = torch.tensor([float(train_step(engine, [batch(step)])) for step in range(3, 6)])
    save_file({name: value.contiguous() for name, value in found.items()}, folder / "expected.safetensors")
    for script in (folder / "checkpoint").glob("*.py"):
        script.unlink()  # DeepSpeed's, and of no use here


if __name__ == "__main__":
    main(Path(sys.argv[1]))
