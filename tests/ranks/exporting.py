"""One rank of a world that trains every family a step and exports it: ``python -m tests.ranks.exporting FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import meft_engine
from tests.families import FAMILIES, fill_values, tiny_block
from tests.integration.engines import ds_config
from tests.integration.test_families import batch


def main(folder: Path) -> None:
    """Families under one stage after the other; the logits of each before and after the way through files."""
    rank = dist.get_rank()
    for number, (name, family) in enumerate(FAMILIES.items()):
        config = ds_config(tiny_block({"center_inputs": number % 3 == 0}), stage=number % 4)
        engine = meft_engine.initialize(model=family.model(), config=config)[0]
        fill_values(engine.meft_adapters)
        inputs = batch(family, 2)
        inputs.setdefault("labels", inputs["input_ids"])
        engine.backward(engine(**inputs, use_cache=False).loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            own = engine(**inputs, use_cache=False).logits
        engine.save_adapter(folder / name)
        engine.destroy()
        if rank == 0:
            loaded = meft_engine.load_adapter(family.model().eval(), folder / name)
            with torch.no_grad():
                found, base = (model(**inputs, use_cache=False).logits for model in (loaded, family.model().eval()))
            torch.save({"own": own, "found": found, "base": base}, folder / f"{name}.pt")
        dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
