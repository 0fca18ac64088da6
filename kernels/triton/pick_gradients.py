"""What the gradient of the output makes of a token's activations, scores and gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import block


@triton.jit
def pick_gradients_kernel(
    GRAD_Y,
    RAW,
    GATES,
    SLOTS,
    PICKS,
    VALID,
    VALUES,
    PLACES,
    GRAD_SCORES,
    GRAD_GATES,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PADDED: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, PADDED)
    grad_gates = tl.zeros((PADDED,), tl.float32)
    for start in range(0, TOP_K, BLOCK_PICKS):
        place = start + tl.arange(0, BLOCK_PICKS)
        pick = token * TOP_K + place
        valid = tl.load(VALID + pick, mask=place < TOP_K, other=0).to(tl.int32) > 0
        row = tl.load(PICKS + pick, mask=valid, other=0)
        if PLACED:
            row = tl.load(PLACES + row, mask=valid, other=0).to(tl.int64)
        dots = tl.zeros((BLOCK_PICKS,), tl.float32)
        for first in range(0, WIDTH, BLOCK_WIDTH):
            column = first + tl.arange(0, BLOCK_WIDTH)
            inside = column < WIDTH
            grad_y = tl.load(GRAD_Y + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            at = VALUES + row[:, None] * WIDTH + column[None, :]
            rows = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
            dots += tl.sum(rows * grad_y[None, :], 1)
        slot = tl.load(SLOTS + pick, mask=valid, other=0)
        gate = tl.load(GATES + token * PER_TOKEN + slot, mask=valid, other=0.0)
        tl.store(GRAD_SCORES + pick, tl.where(valid, dots * gate, 0.0), mask=place < TOP_K)
        of_gate = tl.where(valid, dots * tl.load(RAW + pick, mask=valid, other=0.0), 0.0)
        grad_gates += tl.sum(tl.where(slot[:, None] == experts[None, :], of_gate[:, None], 0.0), 0)
    tl.store(GRAD_GATES + token * PER_TOKEN + experts, grad_gates, mask=experts < PER_TOKEN)


def pick_gradients(
    grad_y: Tensor,
    raw: Tensor,
    gates: Tensor,
    slots: Tensor,
    picks: Tensor,
    valid: Tensor,
    values: Tensor,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw scores and of the gates, where ``y_t = Σ_j gate · score_j · B_j``.

    Reads T · K value rows, most of them from cache, and the gradient of the output once for every 8 picks of a token.

    Args:
        grad_y: [T, d] of any float dtype. raw: [T, K] float32 scores; gates: [T, n] float32.
        slots, picks: [T, K] int64, where ``valid`` [T, K] (bool) says; values: [m, d] bfloat16 or float32; places: as
            ``combine`` has it.

    Returns:
        [T, K] and [T, n] float32; 0 where there is no pick.
    """
    (tokens, top_k), (width, per_token) = picks.shape, (values.shape[1], gates.shape[1])
    grad_scores, grad_gates = torch.empty_like(raw), torch.empty_like(gates)
    if tokens:
        pick_gradients_kernel[(tokens,)](
            grad_y.contiguous(),
            raw,
            gates,
            slots,
            picks,
            valid,
            values,
            picks if places is None else places,
            grad_scores,
            grad_gates,
            WIDTH=width,
            TOP_K=top_k,
            PER_TOKEN=per_token,
            PADDED=triton.next_power_of_2(per_token),
            PLACED=places is not None,
            BLOCK_PICKS=block(top_k, 8),
            BLOCK_WIDTH=block(width, 512, 16),
            num_warps=4,
        )
    return grad_scores, grad_gates
