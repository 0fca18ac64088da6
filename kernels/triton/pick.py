"""The rows that each token keeps: gate times score, the K largest that are above zero."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import block, place_of, ranked


@triton.jit
def pick_kernel(
    SCORES,
    EXPERTS,
    GATES,
    ROWS,
    SLOTS,
    RAW,
    ACTIVATIONS,
    rows,
    PER_TOKEN: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    scores, experts, gates = (
        SCORES + token * (PER_TOKEN * EXPERT_ROWS),
        EXPERTS + token * PER_TOKEN,
        GATES + token * PER_TOKEN,
    )
    # Codes of activations are positive: 0 stands for none.
    best = tl.zeros((PADDED,), tl.int64)
    for start in range(0, PER_TOKEN * EXPERT_ROWS, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        present = candidate < PER_TOKEN * EXPERT_ROWS
        score = tl.load(scores + candidate, mask=present, other=0.0)
        gate = tl.load(gates + candidate // EXPERT_ROWS, mask=present, other=0.0)
        activation = score * gate
        # Not above zero is NaN, too. Candidates are in the order of their rows, so ties go to the lowest row.
        codes = tl.where(activation > 0.0, ranked(activation, candidate), 0)
        codes = tl.topk(codes, PADDED)
        if PER_TOKEN * EXPERT_ROWS > BLOCK:
            codes = tl.topk(tl.reshape(tl.join(best, codes), (2 * PADDED,)), PADDED)
        best = codes
    place = tl.arange(0, PADDED)
    kept = (place < TOP_K) & (best > 0)
    candidate = tl.where(kept, place_of(best), 0x7FFFFFFF)
    if PADDED > 1:
        candidate = tl.sort(candidate)
    kept = candidate < 0x7FFFFFFF
    slot = tl.where(kept, candidate // EXPERT_ROWS, 0)
    raw = tl.load(scores + candidate, mask=kept, other=0.0)
    activation = raw * tl.load(gates + slot, mask=kept, other=0.0)
    expert = tl.load(experts + slot, mask=kept, other=0)
    row = tl.where(kept, expert * EXPERT_ROWS + candidate % EXPERT_ROWS, rows)
    at, inside = token * TOP_K + place, place < TOP_K
    tl.store(ROWS + at, row.to(tl.int32), mask=inside)
    tl.store(SLOTS + at, slot.to(tl.int64), mask=inside)
    tl.store(RAW + at, raw, mask=inside)
    tl.store(ACTIVATIONS + at, activation, mask=inside)


def pick(
    scores: Tensor, experts: Tensor, gates: Tensor, top_k: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The K largest positive ``gate · score`` of each token; ties to the lowest row, NaN never.

    Reads 4 · T · n · E bytes, writes 20 · T · K.

    Args:
        scores: [T, n, E] float32; experts: [T, n] int64, ascending; gates: [T, n] float32; rows: r.

    Returns:
        row ids [T, K] int32, ascending, r where a token has fewer; which of its n experts each is of [T, K] int64; the
        raw score and the activation of each [T, K] float32. All but the ids are 0 where there is none.
    """
    tokens, per_token, expert_rows = scores.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=scores.device)
    slots = torch.empty(tokens, top_k, dtype=torch.int64, device=scores.device)
    raw, activations = (torch.empty(tokens, top_k, device=scores.device) for _ in range(2))
    if tokens:
        padded = triton.next_power_of_2(top_k)
        pick_kernel[(tokens,)](
            scores,
            experts,
            gates,
            ids,
            slots,
            raw,
            activations,
            rows,
            PER_TOKEN=per_token,
            EXPERT_ROWS=expert_rows,
            TOP_K=top_k,
            PADDED=padded,
            BLOCK=block(per_token * expert_rows, max(512, padded), padded),
            num_warps=8,
        )
    return ids, slots, raw, activations
