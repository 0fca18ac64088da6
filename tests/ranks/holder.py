"""One rank that holds an adapter and says how much memory it takes: ``python -m tests.ranks.holder FOLDER MODE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.families import tiny_llama
from tests.integration.engines import build_engine, lm_loss
from tests.ranks.cases import ADAM

ROWS, WIDTH, LAYERS = 16384, 256, 2
PAGE = os.sysconf("SC_PAGE_SIZE")


def tables_memory(engine: Any) -> int:
    """Bytes of this process's part of the pages that rows, moments and steps lie in: pages that n processes map count
    for 1/n in each (PSS).

    The kernel joins private mappings that happen to be neighbours, and says PSS for the whole: what a mapping holds
    beyond these tensors is not theirs.
    """
    tensors = [plane for table in engine.row_optimizer.tables() for plane in table.planes() if plane is not None]
    tensors += [value for state in engine.row_optimizer.state.values() for value in state.values()]
    storages = {(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors}
    spans = [(start - start % PAGE, -(-(start + size) // PAGE) * PAGE) for start, size in storages]
    total = ours = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(end, 16) for end in head.split("-"))
            ours = sum(max(0, min(stop, last) - max(start, first)) for first, last in spans)
        elif ours and head == "Pss:":
            total += min(1024 * int(line.split()[1]), ours)
    return total


def main(folder: Path, mode: str) -> None:
    """Train a step, so that everything is there that will ever be."""
    model = tiny_llama(hidden_size=WIDTH, num_hidden_layers=LAYERS)
    block = {"adapter": {"rows": ROWS, "experts_per_token": 4, "top_k": 8}, "optimizer": {"mode": mode}}
    engine = build_engine(model, {"enabled": True, **block}, bf16=True, adam=ADAM)
    ids = torch.randint(3, 97, (4, 12))
    engine.backward(lm_loss(engine, ids))
    engine.step()
    engine.synchronize_rows()
    dist.barrier()
    found = {"memory": tables_memory(engine), "said": engine.meft_report()["host_bytes"]}
    dist.barrier()
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    main(Path(sys.argv[1]), sys.argv[2])
