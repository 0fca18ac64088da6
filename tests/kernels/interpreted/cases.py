"""What the kernels are run on, where, and the whole adapter made of them.

Cases are drawn and judged on the CPU, wherever the kernels run: in Triton's interpreter, or on a GPU, where
``tests/gpu`` runs the same tests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meft_kernels.triton.cap import keep_largest
from meft_kernels.triton.combine import combine
from meft_kernels.triton.common import INTERPRETED
from meft_kernels.triton.compact import ActiveRows, compact
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.pick import pick
from meft_kernels.triton.pick_gradients import pick_gradients
from meft_kernels.triton.route import route
from meft_kernels.triton.row_gradients import row_gradients
from meft_kernels.triton.score import score

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Of the kernels."""


def moved(value: Any, device: torch.device | str = DEVICE) -> Any:
    """A tensor, or a dataclass of tensors, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def on_host(table: Tensor) -> Tensor:
    """A copy of a table in memory of the host that the kernels can read and write in place."""
    return table.clone() if INTERPRETED else table.pin_memory()


def synchronize() -> None:
    """Wait for the kernels, before the host reads what they have written to its memory."""
    if not INTERPRETED:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Shape:
    """T tokens, width d, N experts of E rows, n experts and K rows a token."""

    tokens: int
    width: int
    experts: int
    expert_rows: int
    per_token: int
    top_k: int

    @property
    def rows(self) -> int:
        return self.experts * self.expert_rows


# Most of them no powers of two; one token, none, one expert, all experts, all rows of them.
SHAPES = [
    Shape(21, 48, 12, 8, 3, 5),
    Shape(16, 64, 16, 16, 4, 8),
    Shape(1, 33, 5, 7, 2, 6),
    Shape(0, 20, 4, 3, 2, 2),
    Shape(9, 17, 1, 13, 1, 1),
    Shape(5, 100, 7, 9, 7, 63),
    Shape(11, 31, 150, 3, 5, 4),
]
KINDS = ["random", "ties", "nan", "negative"]


@dataclass(frozen=True)
class Case:
    """Inputs of the adapter whose sums are exact in fp32, so that selections can be compared exactly."""

    h: Tensor
    keys: Tensor
    values: Tensor
    router: Tensor


def drawn(shape: Shape, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Inputs of a shape.

    Args:
        kind: ``random``: multiples of 1/8, no two rows alike; ``ties``: small integers, and rows and experts that occur
            twice; ``nan``: as ``random`` with NaN and infinities in tokens, keys and router; ``negative``: no score is
            above zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def multiples(*size: int, of: float, most: float) -> Tensor:
        return (torch.randn(*size, generator=generator) / of).round().mul(of).clamp(-most, most)

    step, most = (1.0, 2.0) if kind == "ties" else (0.125, 4.0)
    h = multiples(shape.tokens, shape.width, of=step, most=most)
    keys = multiples(shape.rows, shape.width, of=step, most=most)
    values = multiples(shape.rows, shape.width, of=0.125, most=4.0)
    router = multiples(shape.experts, shape.width, of=step, most=most)
    if kind == "ties":
        router[1::2] = router[0 : 2 * (shape.experts // 2) : 2]
        keys[1::3] = keys[0]
    if kind == "negative":
        h, keys = h.abs() + 0.125, -keys.abs() - 0.125
    if kind == "nan" and shape.tokens:
        h[shape.tokens // 2, 0] = torch.nan
        h[-1, 1] = torch.inf
        keys[0, 2], keys[shape.rows // 2, 3] = torch.nan, -torch.inf
        router[shape.experts // 2, 1] = torch.nan
    return Case(h.to(dtype), keys.to(dtype), values.to(dtype), router.to(dtype))


@dataclass(frozen=True)
class Found:
    """What the kernels make of a case."""

    experts: Tensor
    gates: Tensor
    counts: Tensor
    raw: Tensor
    slots: Tensor
    activations: Tensor
    active: ActiveRows
    y: Tensor

    @property
    def rows(self) -> Tensor:
        """[U] int64: the active rows."""
        return self.active.rows[: int(self.active.count)].long()

    def kept(self, rows: int) -> Tensor:
        """[T, r] bool: which rows contribute to which token."""
        tokens = torch.arange(self.raw.shape[0])[:, None].expand_as(self.raw)
        kept = torch.zeros(self.raw.shape[0], rows, dtype=torch.bool)
        kept[tokens[self.active.valid], self.rows[self.active.positions[self.active.valid]]] = True
        return kept


def forward(
    case: Case,
    shape: Shape,
    gate: str,
    *,
    cap: int | None = None,
    center: Tensor | None = None,
    bias: Tensor | None = None,
) -> Found:
    """The adapter's forward, of kernels alone; given and found on the CPU."""
    case, center, bias = moved(case), moved(center), moved(bias)
    experts, gates, counts = route(case.h, case.router, shape.per_token, gate, center=center, bias=bias)
    pairs = expert_lists(experts, counts)
    scores = score(case.h, case.keys, experts, counts, pairs, center=center)
    ids, slots, raw, activations = pick(scores, experts, gates, shape.top_k, shape.rows)
    active = compact(ids, shape.rows)
    if cap is not None:
        active = keep_largest(active, activations, cap)
    y = combine(activations, active.positions, active.valid, case.values, places=active.rows)
    return moved(Found(experts, gates, counts, raw, slots, activations, active, y), "cpu")


def backward(
    case: Case, found: Found, grad_y: Tensor, center: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the input by way of the scores [T, d], of the gates [T, n], and of keys and values [U, d]; given
    and found on the CPU."""
    case, found, grad_y, center = moved(case), moved(found), moved(grad_y), moved(center)
    active, width = found.active, case.h.shape[1]
    grad_scores, grad_gates = pick_gradients(
        grad_y, found.raw, found.gates, found.slots, active.positions, active.valid, case.values, active.rows
    )
    most = active.rows.shape[0]
    values, keys = (torch.full((most, width), torch.nan, device=DEVICE) for _ in range(2))
    slots, fresh = (moved(of_row.int()) for of_row in (torch.arange(most), torch.ones(most)))
    row_gradients(grad_y, case.h, found.activations, grad_scores, active, values, keys, slots, fresh, center=center)
    grad_h = combine(grad_scores, active.positions, active.valid, case.keys, places=active.rows)
    count = int(active.count)
    return grad_h.cpu(), grad_gates.cpu(), keys[:count].cpu(), values[:count].cpu()
