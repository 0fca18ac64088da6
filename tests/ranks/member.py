"""One rank of a world that runs cases one after the other: ``python -m tests.ranks.member FOLDER``.

The folder holds ``cases.json``; results go to ``<case>.<rank>.pt``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from torch import Tensor

import meft_engine
from meft_engine.parallel import ranks as ranks_module
from tests.families import fill_values
from tests.integration.engines import router_values, tables
from tests.ranks.cases import Case, loss_of, model, sentences


def main(folder: Path) -> None:
    """Run all cases in one process group."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    for line in json.loads((folder / "cases.json").read_text()):
        case = Case(**line)
        torch.save(run(case, rank, size), folder / f"{case.name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(case: Case, rank: int) -> Any:
    """The engine of a case, its values no longer zero."""
    torch.manual_seed(0)
    node = "alone" if case.nodes is None else f"node {next(i for i, n in enumerate(case.nodes) if rank in n)}"
    ranks_module.node_name = lambda: node
    mpu = None
    if case.sequence > 1 and dist.is_initialized() and dist.get_world_size() > 1:
        mpu = parallel_state_sp
        with suppress(AssertionError):  # an earlier case has done so
            mpu.initialize_sequence_parallel(case.sequence)
    engine = meft_engine.initialize(model=model(), config=case.config(), mpu=mpu)[0]
    fill_values(engine.meft_adapters)
    if case.small_messages and engine.ranks.size > 1:
        shared = engine._row_step.shared
        shared.exchange._bucket_bytes = 4096
        if shared.publisher is not None:
            shared.publisher._round_bytes = 1000
    return engine


def run(case: Case, rank: int, size: int, *, as_one_of: int | None = None) -> dict[str, Any]:
    """Train, and tell what came of it.

    Args:
        as_one_of: this single process plays so many ranks: it has all of their sentences in its batch.
    """
    engine = start(case, rank)
    found: dict[str, Any] = {"losses": [], "norms": [], "planes": [], "touched": []}
    for step in range(case.steps):
        total = 0.0
        for micro_step in range(case.accumulation):
            members = range(as_one_of) if as_one_of else [rank]
            parts = [sentences(case, step, micro_step, member, as_one_of or size) for member in members]
            loss = loss_of(engine, *(torch.cat(kind).to(engine.device) for kind in zip(*parts, strict=True)))
            engine.backward(loss)
            if micro_step == case.accumulation - 1:
                found["touched"].append(touched(engine))
            engine.step()
            total += loss.item() / case.accumulation
        found["losses"].append(total)
        found["norms"].append(float(engine.get_global_grad_norm()))
        found["planes"].append(digest(engine))
    found["rows"], found["state"] = rows_and_state(engine)
    found["routers"] = router_values(engine)
    found["report"] = engine.meft_report()
    found["devices"], found["resident_equals_host"] = places(engine)
    if size > 1:
        exchange = engine._row_step.shared.exchange
        found["bytes_sent"] = exchange.bytes_sent
    engine.destroy()
    groups.mpu = None  # or later cases would share sequences too
    return found


def touched(engine: Any) -> dict[str, list[int]]:
    """The rows of every table that this rank has a gradient for."""
    pending = {table.name: table.gradient() for table in engine.row_optimizer.tables()}
    return {name: sorted(g.rows.tolist()) if g is not None else [] for name, g in pending.items()}


def digest(engine: Any) -> str:
    """Of every table's whole compute copy, as this rank reads it."""
    found = hashlib.sha256()
    for table in tables(engine).values():
        found.update(table.planes()[0].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def places(engine: Any) -> tuple[dict[str, str], bool]:
    """Where the compute copies of keys and of values are read, and whether a device's copy is the host's."""
    devices, equal = {}, True
    for name, table in tables(engine).items():
        with table.reading() as rows:
            devices[name.rsplit("/", 1)[1]] = rows.device.type
            equal &= torch.equal(rows.cpu(), table.planes()[0])
    return devices, equal


def rows_and_state(engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every table the rows that this rank owns, with their numbers: masters; moments and steps."""
    rows: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for name, table in tables(engine).items():
        numbers = torch.arange(table.rows)[table.owned]
        rows[name] = numbers, engine.row_optimizer.current_masters(table)[table.owned].clone()
        for kind, value in engine.row_optimizer.state[table.handle].items():
            state[f"{name}/{kind}"] = numbers, value[table.owned].float().clone()
    return rows, state


def whole(parts: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """What the ranks own, put together; every row has one owner."""
    found = {}
    for name in parts[0]:
        numbers = torch.cat([part[name][0] for part in parts])
        assert numbers.sort().values.tolist() == list(range(len(numbers)))
        found[name] = torch.cat([part[name][1] for part in parts])[numbers.argsort()]
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
