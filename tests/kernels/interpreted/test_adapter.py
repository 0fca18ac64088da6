"""The adapter made of the kernels, against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meft_kernels import reference
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.route import route
from meft_kernels.triton.score import score
from tests.kernels.interpreted.cases import KINDS, SHAPES, Case, Shape, backward, drawn, forward, moved

BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, vars(shape).values())))


def defined(case: Case, shape: Shape, gate: str, **options: Any) -> tuple[list[Tensor], Tensor, Any]:
    """The leaves h, keys, values and router; the output; the selection."""
    leaves = [t.double().requires_grad_() for t in (case.h, case.keys, case.values, case.router)]
    y, selection = reference.adapter(
        *leaves, experts_per_token=shape.per_token, top_k=shape.top_k, gate=gate, **options
    )
    return leaves, y, selection


def near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest element, the promise for fp32."""
    finite = expected[expected.isfinite()]
    scale = 1 + (float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * scale, equal_nan=True)


@BY_SHAPE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gate", "cap"), [("softmax", None), ("sigmoid", 7), ("none", 1), ("none", 20)])
def test_selection_and_output(shape, kind, gate, cap):
    if gate == "softmax" and shape.per_token == 1:
        pytest.skip("refused by the configuration")
    case = drawn(shape, kind)
    _, y, selection = defined(case, shape, gate, cap=cap)
    found = forward(case, shape, gate, cap=cap)
    assert torch.equal(found.experts, selection.experts)
    assert found.counts.tolist() == torch.bincount(selection.experts.flatten(), minlength=shape.experts).tolist()
    assert torch.equal(found.rows, selection.active)
    assert torch.equal(found.kept(shape.rows), selection.kept)
    near(found.y, y.detach())


@BY_SHAPE
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize(
    ("gate", "cap", "centered"), [("softmax", None, True), ("sigmoid", 7, False), ("none", 20, True)]
)
def test_gradients(shape, kind, gate, cap, centered):
    if gate == "softmax" and shape.per_token == 1:
        pytest.skip("refused by the configuration")
    case = drawn(shape, kind)
    center = torch.linspace(-1, 1, shape.width).mul(8).round().div(8) if centered else None
    (h, keys, values, router), y, selection = defined(
        case, shape, gate, cap=cap, center=None if center is None else center.double()
    )
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad_y.double())
    found = forward(case, shape, gate, cap=cap, center=center)
    assert torch.equal(found.kept(shape.rows), selection.kept)
    grad_h, grad_gates, grad_keys, grad_values = backward(case, found, grad_y, center)
    near(grad_keys, keys.grad[selection.active])
    near(grad_values, values.grad[selection.active])

    # The rest of the way, from the gates, is torch's.
    inputs, weights = case.h.double().requires_grad_(), case.router.double().requires_grad_()
    x = inputs if center is None else inputs - center
    gates = reference.gates((x @ weights.T).gather(1, found.experts), gate)
    near(found.gates, gates.detach())
    if gate == "none":
        near(grad_h, h.grad)
        assert router.grad is None
    else:
        gates.backward(grad_gates.double())
        near(grad_h, h.grad - inputs.grad)
        near(weights.grad, router.grad)


@BY_SHAPE
def test_bias_counts_for_the_choice_alone(shape):
    case = drawn(shape, "random")
    bias = torch.randn(shape.experts, generator=torch.Generator().manual_seed(2)).mul(16).round()
    _, y, selection = defined(case, shape, "sigmoid", expert_bias=bias.double())
    found = forward(case, shape, "sigmoid", bias=bias)
    assert torch.equal(found.experts, selection.experts)
    near(found.y, y.detach())


def test_nan_experts_come_last_and_infinite_ones_before_them():
    router = torch.tensor([[torch.nan], [-torch.inf], [1.0], [torch.nan], [torch.inf]])
    for per_token, expected in ((1, [4]), (2, [2, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])):
        experts, gates, _ = route(moved(torch.ones(1, 1)), moved(router), per_token, "none")
        assert experts.tolist() == [expected]
        assert gates.isnan().tolist() == [[expert in (0, 3) for expert in expected]]


def test_both_zeros_tie():
    router = torch.tensor([[-1.0, -2.0], [1.0, 0.0], [3.0, 1.0]])
    h, bias = torch.tensor([[0.0, -0.0], [-0.0, 0.0]]), torch.tensor([0.0, -0.0, 0.0])
    experts, _, _ = route(moved(h), moved(router), 2, "none", bias=moved(bias))
    assert experts.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_and_tables(dtype):
    """bf16 holds these inputs exactly, so nothing may change."""
    shape = SHAPES[0]
    narrow = drawn(shape, "random", torch.bfloat16)
    wide = Case(narrow.h.to(dtype), narrow.keys, narrow.values, narrow.router.to(dtype))
    _, y, selection = defined(narrow, shape, "softmax")
    found = forward(wide, shape, "softmax")
    assert torch.equal(found.kept(shape.rows), selection.kept)
    near(found.y, y.detach())


@BY_SHAPE
def test_eight_bit_keys(shape):
    """Keys in int8 are those that their scales make of them."""
    generator = torch.Generator().manual_seed(3)
    case = drawn(shape, "random")
    keys = torch.randint(-127, 128, (shape.rows, shape.width), generator=generator).to(torch.int8)
    scales = torch.rand(shape.rows, generator=generator) + 0.5
    h = moved(case.h)
    experts, _, counts = route(h, moved(case.router), shape.per_token, "sigmoid")
    found = score(h, moved(keys), experts, counts, expert_lists(experts, counts), scales=moved(scales))
    of_expert = (keys.double() * scales.double()[:, None]).view(shape.experts, shape.expert_rows, shape.width)
    expected = torch.einsum("td,tned->tne", case.h.double(), of_expert[experts.cpu()])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-3)
