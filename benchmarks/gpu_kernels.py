"""Each Triton kernel beside the same in PyTorch, on a GPU: what fusing it gains, and how far it is from its floor.

A stage of ``gpu.py``: prints a line for each, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_machine import Speeds, device_seconds, the_device
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.owned import BiasCorrections
from meft_kernels.rows import AdamStep, RowTable
from meft_kernels.slots import Residency
from meft_kernels.sparse import Inputs, RowsAt, Selection
from meft_kernels.triton.adam import adam_rows
from meft_kernels.triton.combine import combine
from meft_kernels.triton.compact import compact
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.gather import gather
from meft_kernels.triton.pick import pick
from meft_kernels.triton.pick_gradients import pick_gradients
from meft_kernels.triton.return_gradients import return_gradients
from meft_kernels.triton.route import route
from meft_kernels.triton.row_gradients import row_gradients
from meft_kernels.triton.score import score

LAUNCH_SECONDS = 10e-6
"""What is done sooner is bound by its launch, whatever its bytes."""
AGREEING = 0.98
"""Of the elements have to agree with PyTorch's: near ties may fall either way."""


@dataclass(frozen=True)
class Sizes:
    """T tokens, width d, r rows in N experts, n experts and K rows a token."""

    tokens: int = 2048
    width: int = 4096
    rows: int = 16384
    experts: int = 256
    per_token: int = 8
    top_k: int = 28


@dataclass(frozen=True)
class Contest:
    """A kernel, the same in PyTorch, and the seconds of each kind that it cannot do without."""

    name: str
    ours: Callable[[], Any]
    torchs: Callable[[], Any]
    moved: float = 0.0
    multiplied: float = 0.0
    carried: float = 0.0
    """Over the bus."""
    compared: bool = True
    """Whether both return the same; some change something in place."""

    @property
    def floor(self) -> float:
        """Seconds; 0 where the other side is the measure."""
        return max(self.moved, self.multiplied, self.carried)

    @property
    def bound_by(self) -> str:
        """What takes longest: ``memory``, ``products`` or ``bus``; or the ``launch``, if nothing takes long."""
        if self.floor < LAUNCH_SECONDS:
            return "launch"
        kinds = {"memory": self.moved, "products": self.multiplied, "bus": self.carried}
        return max(kinds, key=kinds.get)


class Bench:
    """Inputs of one layer's step, and the contests over them."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        t, d, n, k = sizes.tokens, sizes.width, sizes.per_token, sizes.top_k
        bf16 = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter's bf16 is wrong
        self.h, self.grad_y, self.y = (torch.randn(t, d, device=device).to(bf16) for _ in range(3))
        self.router = torch.randn(sizes.experts, d, device=device).to(bf16)
        self.keys, self.values = (torch.randn(sizes.rows, d, device=device).to(bf16) for _ in range(2))
        self.experts, self.gates, self.counts = route(self.h, self.router, n, "softmax")
        self.pairs = expert_lists(self.experts, self.counts)
        self.scores = score(self.h, self.keys, self.experts, self.counts, self.pairs)
        self.ids, self.slots, self.raw, self.activations = pick(self.scores, self.experts, self.gates, k, sizes.rows)
        self.active = compact(self.ids, sizes.rows)
        self.count = int(self.active.count)
        self.active_rows = self.active.rows[: self.count].long()
        self.selection = Selection(self.experts, self.active_rows, self.active.positions, self.slots, self.active.valid)
        self.on_host = self.values.cpu().pin_memory() if device.type == "cuda" else self.values.clone()

    def contests(self, speeds: Speeds) -> list[Contest]:
        """In the order of a step."""
        s, two = self.sizes, self.h.element_size()
        t, d, n, k, count = s.tokens, s.width, s.per_token, s.top_k, self.count

        def moved(*bytes_: int) -> float:
            return sum(bytes_) / speeds.memory

        def multiplied(rows: int, columns: int) -> float:
            return 2 * rows * columns * d / speeds.products

        per_expert = s.rows // s.experts
        rows, scores, inputs = count * d * two, t * n * per_expert * 4, t * d * two
        return [
            Contest("route", self._route, self._torch_route, moved(inputs), multiplied(t, s.experts)),
            Contest(
                "score",
                lambda: score(self.h, self.keys, self.experts, self.counts, self.pairs),
                self._torch_score,
                moved(inputs, s.rows * d * two, scores),
                multiplied(t * n, per_expert),
            ),
            Contest("pick", self._pick, self._torch_pick, moved(scores, t * k * 20)),
            Contest("compact", lambda: compact(self.ids, s.rows).positions, self._torch_compact, moved(t * k * 13)),
            Contest(
                "gather",
                self._gather(fused=True),
                self._staged_gather,
                carried=rows / speeds.to_device,
                compared=False,
            ),
            Contest("gather_fused", self._gather(fused=True), self._gather(fused=False), compared=False),
            Contest("combine", self._combine, self._torch_combine, moved(2 * inputs, rows)),
            Contest("combine_added", self._combine, lambda: (self._combine(False) + self.y).to(self.y.dtype)),
            Contest(
                "backward",
                self._backward,
                self._torch_backward,
                moved(2 * inputs, t * d * 4, 2 * rows, 2 * count * d * 4),
            ),
            Contest("return_gradients", *self._returns(), carried=count * d * 4 / speeds.to_host, compared=False),
            Contest("adam", *self._adam(), moved(count * d * 28), compared=False),
        ]

    def _route(self) -> Tensor:
        return route(self.h, self.router, self.sizes.per_token, "softmax")[1]

    def _torch_route(self) -> Tensor:
        logits = self._product(self.h, self.router)
        experts = logits.topk(self.sizes.per_token, dim=-1).indices.sort(dim=-1).values
        torch.bincount(experts.flatten(), minlength=self.sizes.experts)
        return torch.softmax(logits.gather(1, experts), dim=-1) * self.sizes.per_token

    def _torch_score(self) -> Tensor:
        """One dense product over all keys, and of it the experts' scores: no loop that waits for the device."""
        s = self.sizes
        dense = self._product(self.h, self.keys).view(s.tokens, s.experts, -1)
        return dense.gather(1, self.experts[:, :, None].expand(-1, -1, dense.shape[2]))

    def _product(self, x: Tensor, rows: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return x @ rows.T
        return torch.mm(x, rows.T, out_dtype=torch.float32)

    def _pick(self) -> Tensor:
        return pick(self.scores, self.experts, self.gates, self.sizes.top_k, self.sizes.rows)[2]

    def _torch_pick(self) -> Tensor:
        activations = (self.scores * self.gates[:, :, None]).flatten(1)
        position = activations.topk(self.sizes.top_k, dim=-1).indices.sort(dim=-1).values
        valid = activations.gather(1, position) > 0
        return torch.where(valid, self.scores.flatten(1).gather(1, position), 0)

    def _torch_compact(self) -> Tensor:
        found, inverse = torch.unique(self.ids, return_inverse=True)
        return torch.where(found[inverse] < self.sizes.rows, inverse, 0)

    def _gather(self, *, fused: bool) -> Callable[[], Any]:
        """From the host, none of them there before."""
        residency = Residency.empty(self.sizes.rows, self.count, self.device)
        into = torch.empty(self.count, self.sizes.width, dtype=self.values.dtype, device=self.device)

        def run() -> None:
            residency.version_of_row += 1
            gather(self.on_host, into, self.active.rows, self.active.count, residency, fused=fused)

        return run

    def _staged_gather(self) -> None:
        rows = self.active_rows.cpu()
        staged = torch.empty(len(rows), self.sizes.width, dtype=self.on_host.dtype, pin_memory=self._pins)
        torch.index_select(self.on_host, 0, rows, out=staged).to(self.device, non_blocking=True)

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    def _combine(self, onto: bool = True) -> Tensor:
        picks, valid, rows = self.active.positions, self.active.valid, self.active.rows
        onto, dtype = (self.y, self.y.dtype) if onto else (None, torch.float32)
        return combine(self.activations, picks, valid, self.values, places=rows, onto=onto, dtype=dtype)

    def _torch_combine(self) -> Tensor:
        table = self.values[self.active_rows].float()
        return (
            self.y + F.embedding_bag(self.active.positions, table, per_sample_weights=self.activations, mode="sum")
        ).to(self.y.dtype)

    def _backward(self) -> Tensor:
        active, most = self.active, self.active.rows.shape[0]
        grad_scores, _ = pick_gradients(
            self.grad_y, self.raw, self.gates, self.slots, active.positions, active.valid, self.values, active.rows
        )
        of_rows = [torch.empty(most, self.sizes.width, device=self.device) for _ in range(2)]
        slots = torch.arange(most, dtype=torch.int32, device=self.device)
        row_gradients(
            self.grad_y, self.h, self.activations, grad_scores, active, *of_rows, slots, torch.ones_like(slots)
        )
        combine(grad_scores, active.positions, active.valid, self.keys, places=active.rows)
        return of_rows[1][: self.count]

    def _torch_backward(self) -> Tensor:
        rows = [RowsAt(table, self.active_rows) for table in (self.values, self.keys)]
        return sparse.gradients(self.grad_y, Inputs(self.h, None), self.raw, self.gates, *rows, self.selection).keys

    def _returns(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        gradients = torch.randn(self.count, self.sizes.width, device=self.device)
        total = torch.zeros(self.sizes.rows, self.sizes.width, pin_memory=self._pins)
        slots = torch.arange(self.count, dtype=torch.int32, device=self.device)
        fresh = torch.ones_like(slots)

        def ours() -> None:
            return_gradients(gradients, total, slots, self.active.rows, fresh, self.active.count)

        return ours, lambda: total.index_copy_(0, self.active_rows.cpu(), gradients.cpu())

    def _adam(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        rows, width = self.sizes.rows, self.sizes.width
        weights, m, v = (torch.zeros(rows, width, device=self.device) for _ in range(3))
        table = RowTable(weights, None, m, v, torch.zeros(rows, dtype=torch.int32, device=self.device))
        gradients = torch.randn(self.count, width, device=self.device)
        slots = torch.arange(self.count, dtype=torch.int32, device=self.device)
        step = AdamStep(grad_scale=1.0, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=1.0, seed=0)
        corrections = BiasCorrections().of(step, 100_000, self.device)

        def ours() -> None:
            adam_rows(table, self.active.rows, self.active.count, gradients, slots, step, corrections)

        def torchs() -> None:
            w, m, v = (t[self.active_rows] for t in (table.high, table.exp_avg, table.exp_avg_sq))
            m.lerp_(gradients, 0.1)
            v.mul_(0.999).addcmul_(gradients, gradients, value=0.001)
            w.addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-3)
            for whole, part in ((table.high, w), (table.exp_avg, m), (table.exp_avg_sq, v)):
                whole.index_copy_(0, self.active_rows, part)

        return ours, torchs


def same_share(found: Tensor, expected: Tensor) -> float:
    """Share of elements that agree to what bf16 products leave."""
    tolerance = 0.02 * float(expected.float().abs().max())
    return float(((found.float() - expected.float()).abs() <= tolerance).float().mean())


def measure(bench: Bench, speeds: Speeds) -> dict[str, Any]:
    """Times of all contests, in milliseconds, and their ratios.

    ``memory_bound`` names those that bytes bound; ``disagreeing`` those that do not find what PyTorch finds.
    """
    figures: dict[str, Any] = {"memory_bound": [], "disagreeing": []}
    for contest in bench.contests(speeds):
        name = contest.name
        share = same_share(contest.ours(), contest.torchs()) if contest.compared else 1.0
        ours, torchs = (device_seconds(run, bench.device) for run in (contest.ours, contest.torchs))
        figures[f"{name}_ms"] = round(ours * 1e3, 4)
        figures[f"{name}_unfused_over_fused"] = round(torchs / ours, 3)
        line = f"{name:<18} {ours * 1e3:9.3f} ms; unfused {torchs * 1e3:9.3f} ms, ×{torchs / ours:.2f}"
        if contest.floor:
            figures[f"{name}_floor_over_fused"] = round(contest.floor / ours, 3)
            figures["memory_bound"] += [name] if contest.bound_by == "memory" else []
            floor = f"{contest.floor * 1e3:.3f} ms ({contest.bound_by})"
            line += f"; floor {floor}, {contest.floor / ours:.2f} of it reached"
        if share < AGREEING:
            figures["disagreeing"].append(name)
            line += f"; ONLY {share:.1%} OF THE ELEMENTS AGREE"
        print(line, flush=True)
    return figures


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small tensors, which show that all of it runs")
    tiny = parser.parse_args().tiny
    device = the_device()
    torch.manual_seed(0)
    speeds = Speeds.measure(device, tiny)
    bench = Bench(Sizes(8, 32, 64, 8, 2, 4) if tiny else Sizes(), device)
    print(f"{speeds}; {bench.sizes}, {bench.count} active rows")
    print(json.dumps(measure(bench, speeds)))


if __name__ == "__main__":
    main()
