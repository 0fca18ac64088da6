"""`kernels/reference.py` against the definition written once more, as loops over Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_kernels import reference


def definition(
    h: list, keys: list, values: list, router: list, n: int, k: int, gate: str, cap: int | None, real: list | None
) -> tuple[list[list[float]], list[list[int]], list[dict[int, float]], list[int], float]:
    """The four steps of the definition: y, each token's usable experts, its kept {row: z}, active rows, kept mass."""
    rows, num_experts, width = len(keys), len(router), len(keys[0])
    experts_of, picks_of = [], []
    for t, x in enumerate(h):
        # 1. The n best experts, ties to the lowest id, NaN never; gates over them.
        logits = [dot(x, w) for w in router]
        ranked = sorted((-s, e) for e, s in enumerate(logits) if not math.isnan(s))
        experts = sorted(e for _, e in ranked[:n])
        experts_of.append(experts)
        gates = gates_of([logits[e] for e in experts], gate)
        # 2. The K largest positive activations among their rows, ties to the lowest id, NaN never.
        candidates = []
        for e, c in zip(experts, gates, strict=True):
            size = rows // num_experts
            candidates += [(-c * dot(x, keys[j]), j) for j in range(e * size, (e + 1) * size)]
        positive = sorted((negative, j) for negative, j in candidates if negative < 0)
        is_real = real is None or real[t]
        picks_of.append({j: -negative for negative, j in positive[:k]} if is_real else {})
    # 3. Over the cap, the rows of largest mass remain, ties to the lowest id; tokens do not refill.
    mass = {}
    for picks in picks_of:
        for j, z in picks.items():
            mass[j] = mass.get(j, 0.0) + z
    active = sorted(mass)
    if cap is not None and len(active) > cap:
        active = sorted(j for _, j in sorted((-m, j) for j, m in mass.items())[:cap])
    kept_mass = sum(mass[j] for j in active) / sum(mass.values()) if mass else 1.0
    kept = [{j: z for j, z in picks.items() if j in active} for picks in picks_of]
    # 4. y = Σ z B.
    y = [[sum(z * values[j][i] for j, z in picks.items()) for i in range(width)] for picks in kept]
    return y, experts_of, kept, active, kept_mass


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def gates_of(logits: list[float], gate: str) -> list[float]:
    if gate == "none":
        return [1.0] * len(logits)
    if gate == "sigmoid":
        return [1 / (1 + math.exp(-s)) for s in logits]
    largest = max(logits, default=0.0)
    weights = [math.exp(s - largest) for s in logits]
    return [len(logits) * w / sum(weights) for w in weights]


def integers(generator: torch.Generator, *shape: int, spread: int) -> Tensor:
    """Small whole numbers in float64: their sums are exact in any order, and ties are everywhere."""
    return torch.randint(-spread, spread + 1, shape, generator=generator).double()


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 5),
    width=st.sampled_from([1, 2, 3]),
    experts=st.integers(1, 4),
    size=st.integers(1, 5),
    spread=st.sampled_from([1, 2]),
    nan=st.sampled_from([None, "h", "key", "router"]),
    gate=st.sampled_from(["none", "sigmoid", "softmax"]),
    data=st.data(),
)
def test_reference_is_the_definition(seed, tokens, width, experts, size, spread, nan, gate, data):
    rows = experts * size
    n = data.draw(st.integers(1, experts), "experts per token")
    k = data.draw(st.integers(1, rows + 2), "top k")
    cap = data.draw(st.none() | st.integers(1, rows), "cap") if gate == "none" else None
    generator = torch.Generator().manual_seed(seed)
    h, keys, values, router = (
        integers(generator, count, width, spread=spread) for count in (tokens, rows, rows, experts)
    )
    real = torch.rand(tokens, generator=generator) < 0.8 if data.draw(st.booleans(), "padded") else None
    # Softmax over a NaN is NaN for every expert of the token; that corner is not defined by a loop over experts.
    if nan == "h" and tokens:
        h[tokens // 2, 0] = math.nan
    elif nan == "key":
        keys[rows // 2, 0] = math.nan
    elif nan == "router" and not (gate == "softmax" and n == experts):
        router[0, 0] = math.nan

    y, selection = reference.adapter(
        h, keys, values, router, experts_per_token=n, top_k=k, gate=gate, cap=cap, real=real
    )
    expected_y, experts_of, kept, active, kept_mass = definition(
        h.tolist(),
        keys.tolist(),
        values.tolist(),
        router.tolist(),
        n,
        k,
        gate,
        cap,
        None if real is None else real.tolist(),
    )
    logits = h @ router.T
    for t in range(tokens):
        usable = [e for e in selection.experts[t].tolist() if not logits[t, e].isnan()]
        assert usable == experts_of[t]
        assert selection.kept[t].nonzero().flatten().tolist() == sorted(kept[t])
    assert selection.experts.shape == (tokens, n)
    assert selection.active.tolist() == active
    assert selection.kept_mass == pytest.approx(kept_mass, rel=1e-12)
    torch.testing.assert_close(y, torch.tensor(expected_y, dtype=torch.float64).view(tokens, width))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("cap", [None, 5])
def test_reference_gradients_are_those_of_its_output(gate, cap):
    """Finite differences: nothing in the reference is detached that should not be."""
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(count, 3, generator=generator, dtype=torch.float64).requires_grad_() for count in (4, 12, 12, 3)
    ]

    def output(*tensors: Tensor) -> Tensor:
        return reference.adapter(*tensors, experts_per_token=2, top_k=3, gate=gate, cap=cap)[0]

    assert output(*inputs).abs().sum() > 0
    if cap is not None:
        assert len(reference.adapter(*inputs, experts_per_token=2, top_k=3, gate=gate, cap=cap)[1].active) == cap
    assert torch.autograd.gradcheck(output, inputs)


def test_reference_ranks_ties_by_the_lowest_index_in_long_rows():
    """Long enough for a sort that is not stable to show it."""
    scores = integers(torch.Generator().manual_seed(2), 5, 211, spread=2)
    scores[2, ::3] = math.nan
    for row, found in zip(scores.tolist(), reference.largest(scores, 150).tolist(), strict=True):
        ranked = sorted((i for i in range(211) if not math.isnan(row[i])), key=lambda i: (-row[i], i))[:150]
        assert found[: len(ranked)] == ranked


def test_reference_keeps_float64_and_widens_bf16():
    generator = torch.Generator().manual_seed(5)
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        tensors = [torch.randn(count, 3, generator=generator).to(dtype) for count in (2, 4, 4, 2)]
        y, _ = reference.adapter(*tensors, experts_per_token=1, top_k=2, gate="none")
        expected, _ = reference.adapter(
            *(tensor.to(wide) for tensor in tensors), experts_per_token=1, top_k=2, gate="none"
        )
        assert y.dtype == wide and torch.equal(y, expected)
