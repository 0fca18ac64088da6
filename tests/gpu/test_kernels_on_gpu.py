"""Each Triton kernel on a GPU: the interpreted tests, and what an interpreter cannot show.

That is bf16 in tensor cores, memory of the host that is read and written in place, and programs that run at once.
"""

from __future__ import annotations

import pytest
import torch

from meft_kernels import reference
from meft_kernels.slots import Residency
from meft_kernels.triton.check import fault
from meft_kernels.triton.expert_lists import expert_lists
from meft_kernels.triton.gather import gather
from meft_kernels.triton.return_gradients import return_gradients
from meft_kernels.triton.route import route
from meft_kernels.triton.score import score
from tests.kernels.interpreted.cases import Case, Found, Shape, backward, forward
from tests.kernels.interpreted.test_adam import test_bits, test_steps_are_the_rows_own  # noqa: F401
from tests.kernels.interpreted.test_adapter import (  # noqa: F401
    test_bias_counts_for_the_choice_alone,
    test_both_zeros_tie,
    test_eight_bit_keys,
    test_gradients,
    test_nan_experts_come_last_and_infinite_ones_before_them,
    test_narrow_inputs_and_tables,
    test_selection_and_output,
)
from tests.kernels.interpreted.test_gather import test_against_a_model  # noqa: F401
from tests.kernels.interpreted.test_rows import (  # noqa: F401
    test_a_cap_keeps_the_largest_masses,
    test_combined_rows_are_added_to_what_is_there,
    test_compact,
    test_expert_lists_are_complete_and_in_order,
    test_gradients_return_to_the_host,
    test_sums_go_to_slots_and_are_added,
    test_the_largest_are_exact,
    test_what_is_not_fresh_may_be_anything,
)

# As many programs as there are processors, and tiles of every size.
LARGE = Shape(tokens=700, width=1024, experts=64, expert_rows=48, per_token=6, top_k=20)


def normal(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Case:
    """Inputs as a model has them, whose sums are rounded."""
    generator = torch.Generator().manual_seed(seed)

    def of(rows: int) -> torch.Tensor:
        return torch.randn(rows, shape.width, generator=generator).to(dtype)

    return Case(of(shape.tokens), of(shape.rows), of(shape.rows), of(shape.experts))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """By the norm of the difference."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def test_a_small_layer_is_what_pytorch_finds():
    assert fault(torch.device("cuda")) is None


@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scores_on_tensor_cores(dtype, centered, keys_dtype):
    """Products of bf16 are exact; fp32 is split in two bf16, of 16 bits together, or in parts of tf32, of all bits."""
    if dtype == torch.bfloat16 and keys_dtype == torch.float32:
        pytest.skip("no model has these")
    case, generator = normal(LARGE, dtype), torch.Generator().manual_seed(1)
    scales = torch.rand(LARGE.rows, generator=generator) + 0.5 if keys_dtype == torch.int8 else None
    keys = case.keys.to(keys_dtype)
    if scales is not None:
        keys = torch.randint(-127, 128, keys.shape, generator=generator).to(torch.int8)
    center = torch.randn(LARGE.width, generator=generator) if centered else None
    on_device = {name: None if t is None else t.cuda() for name, t in {"scales": scales, "center": center}.items()}
    h = case.h.cuda()
    experts, _, counts = route(h, case.router.cuda(), LARGE.per_token, "sigmoid", center=on_device["center"])
    found = score(h, keys.cuda(), experts, counts, expert_lists(experts, counts), **on_device)
    x = case.h.double() if center is None else case.h.double() - center.double()
    wide = keys.double() if scales is None else keys.double() * scales.double()[:, None]
    of_expert = wide.view(LARGE.experts, LARGE.expert_rows, LARGE.width)[experts.cpu()]
    expected = torch.einsum("td,tned->tne", x, of_expert)
    # One bf16 in place of two would be off by 1e-3, tf32 by 3e-4.
    assert relative_error(found, expected) < (5e-6 if dtype == torch.bfloat16 and not centered else 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_of_many_programs(dtype):
    """Against the definition in float64, where no two scores are so close that rounding decides."""
    case = normal(LARGE, dtype)
    leaves = [t.double().requires_grad_() for t in (case.h, case.keys, case.values, case.router)]
    y, selection = reference.adapter(
        *leaves, experts_per_token=LARGE.per_token, top_k=LARGE.top_k, gate="sigmoid", cap=None
    )
    found = forward(case, LARGE, "sigmoid")
    same = (found.kept(LARGE.rows) == selection.kept).all(1)
    assert float(same.double().mean()) > 0.98
    assert relative_error(found.y[same], y.detach()[same]) < 1e-4
    # The gradients of tokens whose rows are the same; those of the others are left out of both.
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * same[:, None]
    y.backward(grad_y.double())
    _, _, grad_keys, grad_values = backward(case, found, grad_y)
    assert relative_error(grad_values, leaves[2].grad[found.rows]) < 1e-4
    assert relative_error(grad_keys, leaves[1].grad[found.rows]) < 1e-4


@pytest.mark.parametrize("cap", [None, 700])
def test_the_same_batch_gives_the_same_bits(cap):
    case = normal(LARGE, torch.bfloat16)
    grad_y = torch.randn(LARGE.tokens, LARGE.width, generator=torch.Generator().manual_seed(1))

    def run() -> list[torch.Tensor]:
        found: Found = forward(case, LARGE, "softmax", cap=cap)
        return [found.rows, found.raw, found.y, *backward(case, found, grad_y)]

    expected = run()
    for _ in range(5):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), expected, strict=True))


@pytest.mark.parametrize("programs", [1, 16, 64])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_come_from_pinned_memory(programs, fused):
    """Every row, in many steps that change rows and slots; kernels of other streams run meanwhile."""
    rows, width, slots = 5000, 1000, 3000
    table = torch.randn(rows, width).bfloat16().pin_memory()
    into = torch.full((slots, width), torch.nan, dtype=torch.bfloat16, device="cuda")
    residency, busy = Residency.empty(rows, slots, "cuda"), torch.randn(2048, 2048, device="cuda")
    other = torch.cuda.Stream()
    for step in range(8):
        asked = torch.randperm(rows, generator=torch.Generator().manual_seed(step))[:2500].sort().values
        with torch.cuda.stream(other):
            for _ in range(10):
                busy @ busy
        count = torch.tensor([asked.numel()], dtype=torch.int32, device="cuda")
        found = gather(table, into, asked.int().cuda(), count, residency, programs=programs, fused=fused)
        assert (found.slots >= 0).all() and found.slots.unique().numel() == asked.numel()
        assert torch.equal(into[found.slots.long()].cpu(), table[asked])
        hits, missing, stale, unplaced, _ = found.counts.tolist()
        assert hits + missing + stale == asked.numel() and not unplaced and bool(stale) == bool(step)
        changed = asked[::3]
        table[changed] += 1
        residency.version_of_row[changed.cuda()] += 1


@pytest.mark.parametrize("programs", [1, 16, 64])
def test_gradients_go_to_pinned_memory(programs):
    """Put there first, and added by the calls that follow, in their order."""
    rows, width = 4000, 1000
    total = torch.full((rows, width), torch.nan).pin_memory()
    expected = total.clone()
    for step in range(4):
        of_step = torch.randperm(rows, generator=torch.Generator().manual_seed(step))[:3000].sort().values
        gradients = torch.randn(3000, width, device="cuda")
        fresh = expected[of_step, 0].isnan().int()
        slots, count = torch.arange(3000, dtype=torch.int32, device="cuda"), torch.tensor([3000]).int().cuda()
        return_gradients(gradients, total, slots, of_step.int().cuda(), fresh.cuda(), count, programs=programs)
        expected[of_step] = torch.where(fresh[:, None] > 0, 0, expected[of_step]) + gradients.cpu()
    torch.cuda.synchronize()
    assert torch.equal(total.nan_to_num(), expected.nan_to_num())
