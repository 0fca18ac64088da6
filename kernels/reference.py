"""The definition of the MEFT adapter, in plain differentiable PyTorch.

Every faster path (sparse PyTorch, C++, Triton, inference) is tested against this file. It favours being obviously right
over being fast: it scores all rows and masks, so it takes O(T · r) memory.

Shapes: T tokens, d the model's width, r rows in N experts of E = r / N consecutive rows, n experts per token,
K = top_k.
Source of the method: MEFT, https://arxiv.org/abs/2406.04984, section 3 (Key-Experts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceSelection:
    """What a micro-batch selects."""

    experts: Tensor
    """[T, n] int64: the chosen experts of each token, ascending."""
    kept: Tensor
    """[T, r] bool: the picks that contribute to the output (after the cap)."""
    active: Tensor
    """[U] int64: the rows that any token uses, ascending."""
    kept_mass: float
    """Share of the activations' total that the cap kept, in [0, 1]; 1 where nothing was dropped."""


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row of ``scores`` [T, m]; ties to the lowest index, NaN last."""
    by_score = torch.where(scores.isnan(), -torch.inf, scores).sort(dim=-1, descending=True, stable=True).indices
    nan_last = scores.isnan().gather(1, by_score).sort(dim=-1, stable=True).indices
    return by_score.gather(1, nan_last)[:, :k]


def gates(logits: Tensor, gate: str) -> Tensor:
    """The factor c of each chosen expert, from its logits [T, n]: ``softmax`` (times n, so its mean is 1), ``sigmoid``
    or ``none`` (ones)."""
    if gate == "softmax":
        return torch.softmax(logits, dim=-1) * logits.shape[-1]
    if gate == "sigmoid":
        return torch.sigmoid(logits)
    return torch.ones_like(logits)


def adapter(
    h: Tensor,
    keys: Tensor,
    values: Tensor,
    router: Tensor,
    *,
    experts_per_token: int,
    top_k: int,
    gate: str,
    cap: int | None = None,
    real: Tensor | None = None,
    expert_bias: Tensor | None = None,
    center: Tensor | None = None,
) -> tuple[Tensor, ReferenceSelection]:
    """What the adapter adds to ``FFN(h)``.

    Args:
        h: [T, d] inputs of the FFN.
        keys: [r, d]; values: [r, d]; router: [N, d] with N dividing r.
        experts_per_token: n; top_k: K.
        gate: ``softmax``, ``sigmoid`` or ``none``.
        cap: most active rows, or ``None`` for no cap.
        real: [T] bool, false where a token is padding (which activates nothing); ``None``: all real.
        expert_bias: [N], added to the router's logits for the choice of experts, but not for their gates.
        center: [d], subtracted from h wherever the adapter reads it; ``None``: nothing is.

    Returns:
        y [T, d] in float32 (float64 for float64 inputs), differentiable in h, keys, values and router; the selection.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    h, keys, values, router = (x.to(wide) for x in (h, keys, values, router))
    if center is not None:
        h = h - center
    rows, num_experts = keys.shape[0], router.shape[0]
    expert_of_row = torch.arange(rows, device=h.device) // (rows // num_experts)

    # 1. The router chooses n experts for each token and gates them.
    logits = h @ router.T
    biased = logits.detach() if expert_bias is None else logits.detach() + expert_bias
    experts = largest(biased, experts_per_token).sort(dim=-1).values
    chosen_logits = logits.gather(1, experts)
    c = torch.zeros_like(logits).scatter(1, experts, gates(chosen_logits, gate))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True) & ~logits.isnan()

    # 2. A token keeps its K largest positive activations among the rows of its experts.
    z = c[:, expert_of_row] * (h @ keys.T)
    eligible = chosen[:, expert_of_row] & (z.detach() > 0)
    if real is not None:
        eligible &= real[:, None]
    ranked = torch.where(eligible, z.detach(), -torch.inf)
    picks = torch.zeros_like(eligible).scatter(1, largest(ranked, top_k), True) & eligible

    # 3. The cap keeps the rows of largest mass; tokens do not refill.
    mass = torch.where(picks, z.detach(), 0).sum(0)
    active = picks.any(0)
    if cap is not None and int(active.sum()) > cap:
        by_mass = torch.where(active, mass, -torch.inf)
        active = torch.zeros_like(active).scatter(0, largest(by_mass[None], cap)[0], True)
    kept = picks & active
    total = float(mass.sum())
    kept_mass = float(mass[active].sum()) / total if total > 0 else 1.0

    # 4. The kept activations combine their rows' values.
    y = torch.where(kept, z, 0) @ values
    return y, ReferenceSelection(experts, kept, active.nonzero().flatten(), kept_mass)
