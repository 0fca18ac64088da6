"""One rank of a world that ranks.py starts: ``python ranks_member.py FOLDER``.

The folder holds ``plan.json``; what this rank found goes to ``<rank>.json``.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from ranks_cases import WIRES, Case, Plan, Shape

from meft_engine.cores import claim_cores, rank_cores
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam, run_now
from meft_engine.parallel.ranks import Ranks, find_ranks
from meft_engine.parallel.sharding import Sharding, TablePlan, owned_rows
from meft_engine.parallel.shared_step import SharedRows
from meft_engine.planner.network import ID_BYTES

_TIMEOUT = 120.0  # seconds after which a rank counts as lost


class Adapter:
    """Tables of an adapter and their optimizer, as the engine builds them; bf16 compute copies, fp32 moments."""

    def __init__(self, ranks: Ranks, shape: Shape) -> None:
        self.ranks, self.shape = ranks, shape
        plans = [TablePlan(shape.rows, shape.expert_rows, shape.width, on_device=False)] * shape.tables
        types = {"compute_dtype": torch.bfloat16, "moments_dtype": torch.float32}
        options = {"shares_state": False, "pin_memory": False, "huge_pages": True}
        sharding = Sharding(ranks, plans, **types, **options) if ranks.size > 1 else None
        threads = len(rank_cores())
        self.tables = [
            PartiallyOffloadedTensor(
                f"layers.{index // 2}/{('keys', 'values')[index % 2]}",
                shape.rows,
                shape.width,
                device=torch.device("cpu"),
                compute_dtype=torch.bfloat16,
                resident=index % 2 == 0,
                threads=threads,
                shard=sharding.shard(index) if sharding is not None else None,
            )
            for index in range(shape.tables)
        ]
        self.optimizer = SparseCPUAdam(self.tables, lr=1e-4, threads=threads)
        self._owned = owned_rows(shape.rows, shape.expert_rows, ranks.size)

    def read_all(self) -> None:
        """Visit every page of the node's compute copy, as forwards do in time."""
        for table in self.tables:
            elements = table.planes()[0].view(-1)
            elements[:: mmap.PAGESIZE // elements.itemsize].float().sum()

    def foreign(self, rows: torch.Tensor) -> int:
        """How many of the rows are other ranks'."""
        mine = self._owned[self.ranks.rank]
        return int(((rows < mine.start) | (rows >= mine.stop)).sum())

    def steps(self, case: Case, repetitions: int) -> dict[str, Any]:
        """Train so many steps, and one before them; see :func:`main` for what is told of them."""
        ranks = self.ranks
        dtype = WIRES[case.wire]
        shared = None
        if ranks.size > 1:
            shared = SharedRows(ranks, self.tables, self.shape.expert_rows, dtype=dtype, factor=1 / ranks.size)
        grad = torch.randn(self.shape.tables, case.touched(self.shape.rows), self.shape.width)
        seconds: dict[str, list[float]] = {"exchange": [], "publication": [], "update": []}
        foreign = updated = 0
        counter = _Counter(ranks)
        sent = (0, 0)
        for step in range(repetitions + 1):
            if step == 1:  # the one before warms up
                seconds, foreign, updated = {part: [] for part in seconds}, 0, 0
                sent = _sent(shared)
                counter.begin()
            self.optimizer.zero_grad()
            for index, table in enumerate(self.tables):
                rows = case.draw(self.shape.rows, index, step, ranks.rank)
                foreign += self.foreign(rows)
                table.accumulate(rows, grad[index])
            ranks.barrier()
            start = time.perf_counter()
            if shared is None:
                self.optimizer.gradient_norm()
            else:
                shared.gradient_norm(self.optimizer)
            seconds["exchange"].append(time.perf_counter() - start)
            published, whole, count = self._update(shared)
            seconds["publication"].append(published)
            seconds["update"].append(whole - published)
            updated += count
        kernel = counter.end()
        return {
            "seconds": seconds,
            "foreign_rows": foreign / repetitions,
            "updated_rows": updated / repetitions,
            "floor_bytes": foreign / repetitions * (ID_BYTES + self.shape.width * dtype.itemsize),
            "sent": (_sent(shared)[0] - sent[0]) / repetitions,
            "published": (_sent(shared)[1] - sent[1]) / repetitions,
            "kernel": None if kernel is None else kernel / repetitions,
        }

    def _update(self, shared: SharedRows | None) -> tuple[float, float, int]:
        """Seconds of publishing and of all of the update, and how many rows were updated here."""
        published = 0.0
        updates = self.optimizer.updates()
        if shared is not None:
            updates = shared.with_publication(updates, self.optimizer)

        def timed(publish: Callable[..., None]) -> Callable[..., None]:
            def run(*args: Any) -> None:
                nonlocal published
                start = time.perf_counter()
                publish(*args)
                published += time.perf_counter() - start

            return run

        for update in updates:
            if update.publish is not None:
                update.publish = timed(update.publish)
        count = sum(update.rows.numel() for update in updates)
        start = time.perf_counter()
        run_now(updates)
        return published, time.perf_counter() - start, count

    def close(self) -> None:
        self.optimizer.state.clear()
        for table in self.tables:
            table.close()


class _Counter:
    """Bytes that pass the loopback interface, of all ranks together; read by rank 0 while the others wait."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._before = ranks, None

    def begin(self) -> None:
        self._ranks.barrier()
        self._before = _loopback_bytes()
        self._ranks.barrier()

    def end(self) -> int | None:
        self._ranks.barrier()
        now = _loopback_bytes()
        self._ranks.barrier()
        return None if now is None or self._before is None else now - self._before


def _loopback_bytes() -> int | None:
    # What loopback sends it receives: either counter has every byte once.
    found = psutil.net_io_counters(pernic=True, nowrap=False).get("lo")
    return None if found is None else found.bytes_sent


def _sent(shared: SharedRows | None) -> tuple[int, int]:
    if shared is None:
        return 0, 0
    return shared.exchange.bytes_sent, shared.publisher.bytes_sent if shared.publisher is not None else 0


def _pss() -> int:
    """Bytes of this process's memory, of what it shares its part."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _dense(ranks: Ranks, shape: Shape, repetitions: int) -> dict[str, Any]:
    """All ranks sum an fp32 gradient of all rows, in one tensor."""
    gradient = torch.ones(shape.dense_bytes // 4)
    seconds: list[float] = []
    counter = _Counter(ranks)
    for step in range(repetitions + 1):
        if step == 1:
            seconds = []
            counter.begin()
        ranks.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient, group=ranks.group)
        seconds.append(time.perf_counter() - start)
        gradient.fill_(1.0)  # so that sums stay finite
    kernel = counter.end()
    return {"seconds": {"all_reduce": seconds}, "kernel": None if kernel is None else kernel / repetitions}


def _collective(ranks: Ranks, kind: str, peer_bytes: int, count: int) -> float:
    """Seconds of one of ``count`` collectives, one after the other."""
    size = ranks.size
    if kind == "all_to_all":
        sent, found = (torch.zeros(size * peer_bytes, dtype=torch.uint8) for _ in range(2))
        splits = [peer_bytes] * size

        def run() -> None:
            dist.all_to_all_single(found, sent, splits, splits, group=ranks.group)
    else:
        own = torch.zeros(peer_bytes, dtype=torch.uint8)
        all_of_them = [torch.empty_like(own) for _ in range(size)]

        def run() -> None:
            dist.all_gather(all_of_them, own, group=ranks.group)

    run()
    ranks.barrier()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def _collectives(ranks: Ranks, plan: Plan) -> list[dict[str, Any]]:
    found = []
    for kind in ("all_to_all", "all_gather"):
        for peer_bytes in plan.peer_bytes if kind == "all_to_all" else plan.peer_bytes[:1]:
            count = max(1, min(plan.back_to_back, (8 << 20) // (peer_bytes * ranks.size)))
            seconds = [_collective(ranks, kind, peer_bytes, count) for _ in range(plan.repetitions)]
            found.append({"kind": kind, "peer_bytes": peer_bytes, "seconds": seconds})
    return found


def run(ranks: Ranks, plan: Plan) -> dict[str, Any]:
    """All that the plan asks for.

    Returns:
        ``steps``, ``dense`` and ``memory`` with an element for each shape (and case), and ``collectives``. Seconds are
        those of this rank, step by step; ``sent``, ``published`` and ``floor_bytes`` are bytes of this rank and step,
        ``kernel`` is of all ranks together.
    """
    found: dict[str, Any] = {"steps": [], "dense": [], "memory": [], "collectives": []}
    one_node = ranks.nodes
    for index, shape in enumerate(plan.shapes):
        ranks.barrier()
        before = _pss()
        ranks.barrier()
        adapter = Adapter(ranks, shape)
        adapter.read_all()
        ranks.barrier()
        found["memory"].append({"shape": index, "before": before, "after": _pss()})
        ranks.barrier()
        for number, case in enumerate(plan.cases):
            if case.nodes == 1:
                found["steps"].append({"shape": index, "case": number, **adapter.steps(case, plan.repetitions)})
        adapter.close()
        del adapter
        gc.collect()
        for number, case in enumerate(plan.cases):
            if case.nodes > 1:
                ranks.nodes = _played(ranks, case.nodes)
                ranks.join_column(timedelta(minutes=5))
                adapter = Adapter(ranks, shape)
                found["steps"].append({"shape": index, "case": number, **adapter.steps(case, plan.repetitions)})
                adapter.close()
                del adapter
                gc.collect()
                ranks.nodes = one_node
        if plan.dense and ranks.size > 1:
            found["dense"].append({"shape": index, **_dense(ranks, shape, plan.repetitions)})
    if plan.peer_bytes and ranks.size > 1:
        found["collectives"] = _collectives(ranks, plan)
    return found


def _played(ranks: Ranks, nodes: int) -> list[list[int]]:
    """As many nodes of equally many ranks, of the ranks of this machine."""
    members = ranks.size // nodes
    return [list(range(node * members, (node + 1) * members)) for node in range(nodes)]


def main(folder: Path) -> None:
    """Join the world, measure, and write down what was found."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan = Plan.read(folder / "plan.json")
    torch.manual_seed(rank)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    ranks = find_ranks(_TIMEOUT)
    claim_cores(ranks.cores.cores if ranks.cores is not None else None)
    torch.set_num_threads(len(rank_cores()))
    # What is imported and compiled at first use counts as nobody's memory and nobody's time.
    warm_up = Adapter(ranks, Shape(8, 1, 64))
    warm_up.steps(Case(50.0), 1)
    warm_up.close()
    found = run(ranks, plan)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    ranks.barrier()
    ranks.close()
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
