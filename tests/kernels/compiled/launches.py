"""One call of every wrapper, for a model of seven billion parameters: T = 2048 tokens, d = 4096, and 16,384 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meft_kernels.owned import BiasCorrections
from meft_kernels.rows import AdamStep, RowTable, paired_moments
from meft_kernels.slots import OwnedRows, Residency
from meft_kernels.triton.adam import adam_rows
from meft_kernels.triton.cap import keep_largest
from meft_kernels.triton.combine import combine
from meft_kernels.triton.compact import ActiveRows, compact
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.gather import gather
from meft_kernels.triton.pick import pick
from meft_kernels.triton.pick_gradients import pick_gradients
from meft_kernels.triton.return_gradients import return_gradients
from meft_kernels.triton.route import route
from meft_kernels.triton.row_gradients import row_gradients
from meft_kernels.triton.score import score

T, D, ROWS, EXPERTS, PER_TOKEN, TOP_K, SLOTS = 2048, 4096, 16384, 256, 8, 28, 12288


def _of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of which nothing is ever read, nor any memory taken."""
    return torch.empty(*shape, dtype=dtype)


def _active() -> ActiveRows:
    ids = torch.zeros(T, TOP_K, dtype=torch.int32)
    return compact(ids, ROWS)


def calls() -> dict[str, Callable[[], Any]]:
    """By name; those that stand behind a slash are variants of one kernel."""
    bf16, int8, int32, int64 = torch.bfloat16, torch.int8, torch.int32, torch.int64
    narrow, wide, center = _of(T, D, dtype=bf16), _of(T, D), _of(D)
    router, keys, values = (_of(count, D, dtype=bf16) for count in (EXPERTS, ROWS, SLOTS))
    experts, gates = torch.zeros(T, PER_TOKEN, dtype=int64), _of(T, PER_TOKEN)
    counts, pairs = torch.zeros(EXPERTS, dtype=int32), _of(T * PER_TOKEN, dtype=int32)
    weights, slots, valid = _of(T, TOP_K), torch.zeros(T, TOP_K, dtype=int64), torch.zeros(T, TOP_K, dtype=torch.bool)
    most = min(ROWS, T * TOP_K)
    places, fresh, count = _of(most, dtype=int32), _of(most, dtype=int32), _of(1, dtype=int32)
    gradients = [_of(SLOTS, D) for _ in range(2)]
    step = AdamStep(1.0, 1e-3, (0.9, 0.999), 1e-8, 1.0, seed=2**40)

    def of_router(h: Tensor, weight: Tensor, **options: Any) -> Callable[[], Any]:
        return lambda: route(h, weight, PER_TOKEN, "softmax", **options)

    def of_scores(h: Tensor, table: Tensor, **options: Any) -> Callable[[], Any]:
        return lambda: score(h, table, experts, counts, pairs, **options)

    def of_picks(expert_rows: int, top_k: int) -> Callable[[], Any]:
        return lambda: pick(_of(T, PER_TOKEN, expert_rows), experts, gates, top_k, ROWS)

    def of_adam(planes: bool, paired: bool) -> Callable[[], Any]:
        high = _of(ROWS, D, dtype=bf16 if planes else torch.float32)
        moments = paired_moments(_of(ROWS, D, 2, dtype=bf16)) if paired else (_of(ROWS, D), _of(ROWS, D))
        table = RowTable(high, _of(ROWS, D, dtype=torch.int16) if planes else None, *moments, _of(ROWS, dtype=int32))
        corrections = BiasCorrections().of(step, 10, "cpu")
        return lambda: adam_rows(table, places, count, gradients[0], fresh, step, corrections)

    return {
        "route": of_router(narrow, router),
        "route/centered": of_router(narrow, router, center=center, bias=_of(EXPERTS)),
        "route/fp32": of_router(wide, _of(EXPERTS, D)),
        "route/1024 experts": of_router(narrow, _of(1024, D, dtype=bf16), center=center),
        "expert_lists": lambda: expert_lists(experts, counts),
        "score": of_scores(narrow, keys),
        "score/centered": of_scores(narrow, keys, center=center),
        "score/int8": of_scores(narrow, _of(ROWS, D, dtype=int8), scales=_of(ROWS), center=center),
        "score/fp32": of_scores(wide, _of(ROWS, D)),
        "pick": of_picks(ROWS // EXPERTS, TOP_K),
        "pick/4096 candidates": of_picks(512, 64),
        "compact": _active,
        "cap": lambda: keep_largest(_active(), weights, 3072),
        "gather": lambda: gather(keys, values, places, count, Residency.empty(ROWS, SLOTS, "cpu")),
        "gather/owned": lambda: gather(
            keys, values, places, count, Residency.empty(ROWS, SLOTS, "cpu"), owned=OwnedRows(keys, places)
        ),
        "gather/apart": lambda: gather(keys, values, places, count, Residency.empty(ROWS, SLOTS, "cpu"), fused=False),
        "combine": lambda: combine(weights, slots, valid, values, places=places, onto=narrow, dtype=bf16),
        "combine/int8": lambda: combine(weights, slots, valid, _of(ROWS, D, dtype=int8), scales=_of(ROWS)),
        "pick_gradients": lambda: pick_gradients(narrow, weights, gates, slots, slots, valid, values, places),
        "row_gradients": lambda: row_gradients(
            narrow, narrow, weights, weights, _active(), *gradients, places, fresh, center=center
        ),
        "return_gradients": lambda: return_gradients(gradients[0], _of(ROWS, D), places, places, fresh, count),
        "adam": of_adam(planes=True, paired=False),
        "adam/bf16 moments": of_adam(planes=True, paired=True),
        "adam/fp32": of_adam(planes=False, paired=False),
    }
