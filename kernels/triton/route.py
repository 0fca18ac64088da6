"""Router: each token's experts and their gates, in one launch and without a T × N matrix in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.triton.common import LEAST, arithmetic, block, place_of, products, ranked


@triton.jit
def route_kernel(
    H,
    CENTER,
    ROUTER,
    BIAS,
    EXPERTS,
    GATES,
    COUNTS,
    tokens,
    num_experts,
    WIDTH: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PADDED: tl.constexpr,
    GATE: tl.constexpr,
    CENTERED: tl.constexpr,
    BIASED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    real = token < tokens
    place = tl.arange(0, PADDED)
    # The best so far, in no order. A place that is still free is worth less than any expert; one beyond PER_TOKEN more.
    free = tl.where(place < PER_TOKEN, place.to(tl.int64) + (LEAST + 1), 0x7FFFFFFFFFFFFFFF)
    best = free[None, :] + tl.zeros((BLOCK_TOKENS, PADDED), tl.int64)
    logits = tl.zeros((BLOCK_TOKENS, PADDED), tl.float32)
    for first in range(0, num_experts, BLOCK_EXPERTS):
        expert = first + tl.arange(0, BLOCK_EXPERTS)
        present = expert < num_experts
        found = products(H, CENTER, ROUTER, token, real, expert, present, WIDTH, CENTERED, ARITHMETIC, BLOCK_WIDTH)
        wanted = found
        if BIASED:
            wanted = found + tl.load(BIAS + expert, mask=present, other=0.0)[None, :]
        codes = tl.where(present[None, :], ranked(wanted, expert[None, :]), LEAST)
        for _ in range(PER_TOKEN):
            most = tl.max(codes, 1)[:, None]
            least = tl.min(best, 1)[:, None]
            taken = codes == most
            logit = tl.sum(tl.where(taken, found, 0.0), 1)[:, None]
            replaced = (best == least) & (most > least)
            best = tl.where(replaced, most, best)
            logits = tl.where(replaced, logit, logits)
            codes = tl.where(taken, LEAST, codes)

    # By ascending id, each with its logit in the lower half.
    chosen = tl.where(place[None, :] < PER_TOKEN, place_of(best), 0x7FFFFFFF)
    pairs = (chosen.to(tl.int64) << 32) | (logits.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    if PADDED > 1:
        pairs = tl.sort(pairs, dim=1)
    chosen = (pairs >> 32).to(tl.int32)
    logits = (pairs & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)

    inside = real[:, None] & (place < PER_TOKEN)[None, :]
    if GATE == "softmax":
        shown = tl.where(place[None, :] < PER_TOKEN, logits, float("-inf"))
        powers = tl.exp(shown - tl.max(shown, 1)[:, None])
        gates = powers / tl.sum(powers, 1)[:, None] * PER_TOKEN
    elif GATE == "sigmoid":
        gates = 1.0 / (1.0 + tl.exp(-logits))
    else:
        gates = tl.where(logits == logits, 1.0, logits)
    at = token[:, None].to(tl.int64) * PER_TOKEN + place[None, :]
    tl.store(EXPERTS + at, chosen.to(tl.int64), mask=inside)
    tl.store(GATES + at, gates, mask=inside)
    tl.atomic_add(COUNTS + chosen, tl.full((BLOCK_TOKENS, PADDED), 1, tl.int32), mask=inside, sem="relaxed")


def route(
    h: Tensor,
    router: Tensor,
    experts_per_token: int,
    gate: str,
    *,
    center: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The n experts of largest logit ``(h − center) · W_g`` (+ bias) of each token; ties to the lowest id, NaN last.

    Reads h once for every 64 experts, and the router once for every 16 tokens, from cache; writes 12 · T · n bytes.

    Args:
        h: [T, d] bfloat16 or float32. router: [N, d] likewise. gate: ``softmax`` (times n), ``sigmoid`` or ``none``.
        center: [d] float32, subtracted from h. bias: [N] float32, which counts for the choice and not for the gate.

    Returns:
        experts [T, n] int64, ascending; gates [T, n] float32, NaN where the logit is; counts [N] int32 of the tokens
        that chose an expert.
    """
    (tokens, width), num_experts = h.shape, router.shape[0]
    h, router = h.contiguous(), router.contiguous()
    experts = torch.empty(tokens, experts_per_token, dtype=torch.int64, device=h.device)
    gates = torch.empty(tokens, experts_per_token, device=h.device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=h.device)
    if tokens:
        block_tokens = 16
        route_kernel[(triton.cdiv(tokens, block_tokens),)](
            h,
            h if center is None else center,
            router,
            h if bias is None else bias,
            experts,
            gates,
            counts,
            tokens,
            num_experts,
            WIDTH=width,
            PER_TOKEN=experts_per_token,
            PADDED=triton.next_power_of_2(experts_per_token),
            GATE=gate,
            CENTERED=center is not None,
            BIASED=bias is not None,
            ARITHMETIC=arithmetic(h, router, centered=center is not None),
            BLOCK_TOKENS=block_tokens,
            BLOCK_EXPERTS=block(num_experts, 64, 16),
            BLOCK_WIDTH=block(width, 64 if router.element_size() < 4 else 32, 16),
            num_warps=8,
        )
    return experts, gates, counts
