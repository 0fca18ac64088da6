"""Which tokens each expert is to score, without a sort and without asking the device how many they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def expert_lists_kernel(
    EXPERTS, COUNTS, PAIRS, pairs, num_experts, PADDED_EXPERTS: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    expert = tl.program_id(0)
    others = tl.arange(0, PADDED_EXPERTS)
    counts = tl.load(COUNTS + others, mask=others < num_experts, other=0)
    place = tl.sum(tl.where(others < expert, counts, 0), 0)
    for start in range(0, pairs, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS)
        ours = (tl.load(EXPERTS + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(PAIRS + place + tl.cumsum(ours, 0) - ours, pair, mask=ours > 0)
        place += tl.sum(ours, 0)


def expert_lists(experts: Tensor, counts: Tensor) -> Tensor:
    """The pairs (token, choice) in the order of their experts, and within one in the order of the tokens.

    Each expert's program reads all choices: N · 8 · T · n bytes, from cache.

    Args:
        experts: [T, n] int64. counts: [N] int32, of each expert's pairs.

    Returns:
        pairs [T · n] int32: ``token · n + choice``.
    """
    num_experts = counts.shape[0]
    pairs = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    if experts.numel():
        expert_lists_kernel[(num_experts,)](
            experts,
            counts,
            pairs,
            experts.numel(),
            num_experts,
            PADDED_EXPERTS=triton.next_power_of_2(num_experts),
            BLOCK_PAIRS=min(1024, triton.next_power_of_2(experts.numel())),
            num_warps=4,
        )
    return pairs
