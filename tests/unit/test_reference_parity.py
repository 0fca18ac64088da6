"""The sparse paths equal `kernels/reference.py`: the kernels' selections, then the adapter's outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from meft_engine.adapter.calls import CallTracker
from meft_engine.adapter.module import SparseAdapter
from meft_engine.adapter.routing import ActiveRowsOverflow
from meft_engine.config import MeftConfig
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_kernels import reference, sparse
from meft_kernels.cpu import build as building
from meft_kernels.cpu import native_rows, native_sparse
from meft_kernels.sparse import RowsAt, gates_of

# Scores closer than this may legitimately be ordered differently by two ways of summing.
GAP = 1e-5

AWKWARD = [0.0, -0.0, 1.5, -1.5, math.inf, -math.inf, math.nan, 1e-45]


@pytest.fixture(scope="module", params=["native", "portable", "pytorch"], autouse=True)
def passes(request, compiled_passes) -> Iterator[ModuleType]:
    """Compiled with this machine's instructions, with those of every machine, and in PyTorch; adapters use them too."""
    library = None if request.param == "pytorch" else building.build(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for module in (building, native_rows, native_sparse):
            patch.setattr(module, "library", lambda: library)
        yield sparse if library is None else native_sparse


@dataclass(frozen=True)
class Case:
    """One micro-batch and one adapter."""

    h: Tensor
    keys: Tensor
    values: Tensor
    router: Tensor
    n: int
    k: int
    gate: str
    cap: int | None = None
    real: Tensor | None = None
    center: Tensor | None = None

    def reference(self, **replaced) -> tuple[Tensor, reference.ReferenceSelection]:
        case = replace(self, **replaced)
        return reference.adapter(
            case.h,
            case.keys,
            case.values,
            case.router,
            experts_per_token=case.n,
            top_k=case.k,
            gate=case.gate,
            cap=case.cap,
            real=case.real,
            center=case.center,
        )


def whole(seed: int, spread: int, *shape: int) -> Tensor:
    """Small whole numbers: sums are exact in any order, so ties are real ties and selections must agree exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-spread, spread + 1, shape, generator=generator).float()


@st.composite
def exact_cases(draw, smallest_cap_is_k: bool = False, max_surplus: int = 3) -> Case:
    """Exactly summable cases: whole numbers, and gates that are powers of two or multiply whole numbers alone.

    ``sigmoid`` gets a router of zeros (a gap of zero between experts, a gate of one half). ``softmax`` is not exact,
    but its factors only tie where the logits do, and then exactly; a cap would sum them, so it gets none.
    """
    experts, size = draw(st.integers(1, 5), "experts"), draw(st.integers(1, 7), "rows an expert")
    kind = draw(st.sampled_from(["none", "sigmoid", "softmax"] if experts > 1 else ["none", "sigmoid"]), "gate")
    n = draw(st.integers(2 if kind == "softmax" else 1, experts), "n")
    k = draw(st.integers(1, n * size + max_surplus), "K")
    tokens, width = draw(st.integers(0, 11), "tokens"), draw(st.sampled_from([1, 2, 3, 5, 13]), "width")
    spread, seed = draw(st.sampled_from([1, 2]), "spread"), draw(st.integers(0, 10**6), "seed")
    lowest = min(k, experts * size) if smallest_cap_is_k else 1
    cap = draw(st.none() | st.integers(lowest, experts * size), "cap") if kind != "softmax" else None
    center = whole(seed + 4, spread, width)
    centered = draw(st.booleans(), "centered") and bool(center.any())
    return Case(
        h=whole(seed, spread, tokens, width),
        keys=whole(seed + 1, spread, experts * size, width),
        values=whole(seed + 2, spread, experts * size, width),
        router=whole(seed + 3, 0 if kind == "sigmoid" else spread, experts, width),
        n=n,
        k=k,
        gate=kind,
        cap=cap,
        center=center if centered else None,
    )


def run_kernels(passes: ModuleType, case: Case) -> tuple[Tensor, sparse.Selection, sparse.Overflow]:
    """Output, selection and what the cap did, by the passes alone."""
    given = passes.inputs(case.h, case.center)
    chosen = passes.choose_experts(given, case.router, case.n, case.gate, None)
    assert torch.equal(chosen.counts, torch.bincount(chosen.experts.flatten(), minlength=case.router.shape[0]))
    selection, raw, overflow = passes.choose_rows(given, case.keys, chosen, top_k=case.k, cap=case.cap)
    weights = raw * passes.picked_gates(chosen.gates, selection)
    y = passes.combine_rows(weights, RowsAt(case.values, selection.active), selection)
    copied = passes.combine_rows(weights, RowsAt(case.values[selection.active], None), selection)
    assert torch.equal(y, copied)
    return y, selection, overflow


def kept_mask(selection: sparse.Selection, rows: int) -> Tensor:
    """[T, r] bool: the selection in the reference's form."""
    mask = torch.zeros(selection.picks.shape[0], rows, dtype=torch.bool)
    for t, position in selection.valid.nonzero().tolist():
        mask[t, selection.active[selection.picks[t, position]]] = True
    return mask


def assert_same_selection(passes: ModuleType, case: Case) -> None:
    y, selection, overflow = run_kernels(passes, case)
    expected_y, expected = case.reference()
    assert torch.equal(selection.experts, expected.experts)
    assert torch.equal(selection.active, expected.active)
    assert torch.equal(kept_mask(selection, case.keys.shape[0]), expected.kept)
    assert not selection.picks[~selection.valid].any() and not selection.slots[~selection.valid].any()
    assert overflow.wanted_rows == len(case.reference(cap=None)[1].active)
    share = float(overflow.kept_mass / overflow.mass) if overflow.mass > 0 else 1.0
    assert share == pytest.approx(expected.kept_mass, rel=1e-6)
    assert_near(y, expected_y)


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    """To 1e-5 of the largest element, the promise for fp32."""
    assert found is not None and expected is not None and found.shape == expected.shape
    scale = 1 + (float(expected.detach().abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@given(case=exact_cases())
def test_selections_and_outputs_of_the_kernels(passes, case):
    """Over ties everywhere, K beyond the candidates, one expert, no tokens, and any cap."""
    assert_same_selection(passes, case)


@given(case=exact_cases(), where=st.sampled_from(["h", "key", "router"]), place=st.integers(0, 10**6))
def test_nan_is_never_selected(passes, case, where, place):
    """A NaN in a token, in a key or in a router's row takes itself out and leaves everything else as it was."""
    table = {"h": case.h, "key": case.keys, "router": case.router}[where]
    assume(table.shape[0] > 0)
    table[place % table.shape[0], place % table.shape[1]] = math.nan
    assert_same_selection(passes, case)


@given(
    rows=st.lists(st.lists(st.sampled_from(AWKWARD), min_size=5, max_size=5)),
    n=st.integers(1, 5),
)
def test_route_breaks_ties_by_the_lowest_id_and_puts_nan_last(passes, rows, n):
    expected = []
    for row in rows:
        order = sorted(range(5), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))
        expected.append(sorted(order[:n]))
    logits = torch.tensor(rows).view(-1, 5)
    assert passes.route(logits, n).tolist() == expected
    # The reference ranks in another way (a stable sort), so it is held to the same order.
    if not (logits.isnan() | (logits == -math.inf)).any():
        assert reference.largest(logits, n).sort().values.tolist() == expected


def test_large_batches_are_scored_in_blocks(monkeypatch):
    """The blocks bound memory and must not show: with three tokens a block, ten tokens end in a block of one."""
    case = Case(whole(1, 2, 10, 5), whole(2, 2, 12, 5), whole(3, 2, 12, 5), whole(4, 2, 3, 5), n=2, k=4, gate="none")
    _, selection, _ = run_kernels(sparse, case)
    table = case.keys[selection.active]
    expected = torch.where(selection.valid, (case.h[:, None] * table[selection.picks]).sum(-1), 0)
    calls = []
    original = torch.bmm
    monkeypatch.setattr(sparse, "_BLOCK_ELEMENTS", 3 * 4 * 5)
    monkeypatch.setattr(torch, "bmm", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    assert torch.equal(sparse.score_picks(case.h, RowsAt(table, None), selection), expected)
    assert len(calls) == 4 and selection.valid.any() and not selection.valid.all()


class Stack(nn.Module):
    """Calls one adapter as a layer stack would: with a mask."""

    adapter: SparseAdapter

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.adapter(inputs_embeds)


def build(case: Case, compute_dtype: torch.dtype = torch.float32, on_overflow: str = "keep_largest") -> Stack:
    """A real adapter over real tables."""
    rows, width = case.keys.shape
    config = MeftConfig.from_block(
        {
            "adapter": {
                "rows": rows,
                "num_experts": case.router.shape[0],
                "experts_per_token": case.n,
                "top_k": case.k,
                "gate": case.gate,
                "center_inputs": case.center is not None,
            },
            "router": {"balance": "none"},
            "active_rows": {"cap": case.cap, "on_overflow": on_overflow},
        }
    )
    stack = Stack()
    tables = [
        PartiallyOffloadedTensor(name, rows, width, device="cpu", compute_dtype=compute_dtype, resident=name == "keys")
        for name in ("keys", "values")
    ]
    tables[0].fill(case.keys)
    tables[1].fill(case.values)
    stack.adapter = SparseAdapter("layer", config, case.router.clone(), *tables, CallTracker(stack))
    if case.center is not None:
        stack.adapter.set_center(case.center)
    return stack.train()


def dense_gradient(table: PartiallyOffloadedTensor, active: Tensor) -> Tensor:
    """The accumulated gradient as [r, d]; its rows must be exactly the active ones."""
    gradient, dense = table.gradient(), torch.zeros_like(table.master)
    assert (gradient.rows if gradient else torch.empty(0, dtype=torch.int64)).tolist() == active.tolist()
    return dense if gradient is None else dense.index_copy_(0, gradient.rows, gradient.grad)


def assert_adapter_equals_reference(case: Case, batch: int = 1, exact: bool = False) -> None:
    """Outputs and all gradients, under an upstream gradient of whole numbers."""
    tokens, width = case.h.shape
    h = case.h.view(batch, -1, width).clone().requires_grad_()
    mask = None if case.real is None else case.real.view(batch, -1).long()
    stack = build(case)
    y = stack(h, attention_mask=mask)
    upstream = whole(99, 2, tokens, width)
    y.backward(upstream.view_as(y))

    # In double: in single precision the reference's own gradients of steep softmaxes are off by more than the promise.
    leaves = {name: getattr(case, name).double().requires_grad_() for name in ("h", "keys", "values", "router")}
    expected, selection = case.reference(**leaves)
    expected.backward(upstream.double())
    adapter = stack.adapter
    pairs = [
        (y.view(tokens, width), expected),
        (h.grad.view(tokens, width), leaves["h"].grad),
        (dense_gradient(adapter.keys, selection.active), leaves["keys"].grad),
        (dense_gradient(adapter.values, selection.active), leaves["values"].grad),
    ]
    if case.gate == "none":
        assert adapter.router.grad is None and not adapter.router.requires_grad
    else:
        pairs.append((adapter.router.grad, leaves["router"].grad))
    for found, wanted in pairs:
        assert torch.equal(found.double(), wanted) if exact else True
        assert_near(found.double(), wanted)
    assert (adapter.stats.micro_batches, adapter.stats.active_rows) == (1, len(selection.active))


@given(case=exact_cases(smallest_cap_is_k=True, max_surplus=0), data=st.data())
def test_outputs_and_gradients_of_the_adapter(case, data):
    """With padding anywhere in the batch, a binding cap or none, and active sets that may be empty."""
    tokens = case.h.shape[0]
    if data.draw(st.booleans(), "padded"):
        bits = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens), "real")
        case = replace(case, real=torch.tensor(bits, dtype=torch.bool))
    batch = data.draw(st.sampled_from([b for b in (1, 2, 3) if tokens % b == 0]), "batch")
    assert_adapter_equals_reference(case, batch, exact=case.gate == "none")


def smallest_gap(case: Case) -> float:
    """The smallest difference between two numbers that a selection compares, in float64."""
    h, keys, router = case.h.double(), case.keys.double(), case.router.double()
    logits = h @ router.T
    experts = logits.argsort(descending=True)[:, : case.n].sort().values
    gates = torch.zeros_like(logits).scatter(1, experts, gates_of(logits.gather(1, experts), case.gate))
    z = gates.repeat_interleave(keys.shape[0] // router.shape[0], dim=1) * (h @ keys.T)
    ranked, mass = z.clamp_min(0).sort(descending=True).values, z.new_zeros(z.shape[1])
    kept = torch.where((z > 0) & (z >= ranked[:, case.k - 1 : case.k]), z, 0)
    mass = kept.sum(0).sort(descending=True).values
    gaps = [logits.sort().values.diff(), z[z != 0].abs(), ranked.diff()[ranked[:, 1:] > 0], mass.diff()[mass[1:] > 0]]
    return min((float(g.abs().min()) for g in gaps if g.numel()), default=math.inf)


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 11),
    shape=st.sampled_from([(2, 2, 3), (3, 2, 7), (5, 3, 1), (7, 7, 2), (1, 1, 11)]),
    width=st.sampled_from([2, 7, 31]),
    kind=st.sampled_from(["sigmoid", "softmax", "none"]),
    data=st.data(),
)
def test_outputs_and_gradients_for_real_numbers(seed, tokens, shape, width, kind, data):
    """Gates that are no powers of two, where the router learns; cases too close to call are left out."""
    experts, n, size = shape
    assume(kind != "softmax" or n > 1)
    generator = torch.Generator().manual_seed(seed)
    h, keys, values, router = (
        torch.randn(count, width, generator=generator) for count in (tokens, experts * size, experts * size, experts)
    )
    k = data.draw(st.integers(1, n * size), "K")
    cap = data.draw(st.none() | st.integers(k, experts * size), "cap")
    case = Case(h, keys, values, router, n, k, kind, cap)
    assume(smallest_gap(case) > GAP)
    assert_adapter_equals_reference(case)


@pytest.mark.parametrize("kind", ["none", "sigmoid", "softmax"])
def test_no_positive_score_leaves_the_output_and_the_rows_alone(kind):
    h, keys = whole(1, 2, 7, 5).abs() + 1, -whole(2, 2, 6, 5).abs()
    case = Case(h, keys, whole(3, 2, 6, 5), whole(4, 2, 3, 5), n=2, k=3, gate=kind)
    assert len(case.reference()[1].active) == 0
    assert_adapter_equals_reference(case, exact=True)


def test_rows_get_their_gradient_where_nothing_else_requires_one():
    """As in a first layer over a frozen base, with routers that do not train."""
    case = Case(whole(1, 2, 7, 5), whole(2, 2, 12, 5), whole(3, 2, 12, 5), whole(4, 2, 3, 5), n=2, k=4, gate="none")
    stack, with_grad = build(case), build(case)
    for one, h in ((stack, case.h[None]), (with_grad, case.h[None].clone().requires_grad_())):
        # Past the stack, which would let its input require grad.
        one.adapter(h).sum().backward()
    for kind in ("keys", "values"):
        found, expected = (getattr(one.adapter, kind).gradient() for one in (stack, with_grad))
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.grad, expected.grad)
        assert found.grad.any()


@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_every_row_active(kind):
    """One expert, K = r, scores all positive: the adapter is a dense parallel FFN with ReLU."""
    h, keys, values = whole(1, 2, 7, 5).abs() + 1, whole(2, 2, 11, 5).abs() + 1, whole(3, 2, 11, 5)
    case = Case(h, keys, values, torch.zeros(1, 5), n=1, k=11, gate=kind)
    assert_adapter_equals_reference(case, exact=True)
    y, factor = build(case)(h[None]), 1.0 if kind == "none" else 0.5
    assert torch.equal(y[0], factor * (h @ keys.T).relu() @ values)


def test_a_token_does_not_depend_on_its_neighbours():
    case = Case(whole(1, 2, 13, 5), whole(2, 2, 21, 5), whole(3, 2, 21, 5), whole(4, 2, 3, 5), n=2, k=4, gate="softmax")
    stack = build(case)
    together = stack(case.h[None])[0]
    for t in range(13):
        assert torch.equal(stack(case.h[None, t : t + 1])[0, 0], together[t])


@pytest.mark.parametrize("kind", ["none", "sigmoid", "softmax"])
def test_nan_in_one_token_stays_there(kind):
    """Its own output is not touched by the adapter, and neither are the other tokens'."""
    case = Case(whole(1, 2, 7, 5), whole(2, 2, 12, 5), whole(3, 2, 12, 5), whole(4, 2, 3, 5), n=2, k=8, gate=kind)
    clean = build(case)(case.h[None])[0]
    h = case.h.clone()
    h[3, 1] = math.nan
    y = build(case)(h[None])[0]
    assert_near(y, replace(case, h=h).reference()[0])
    assert torch.equal(y[3], torch.zeros(5)) and torch.equal(y[[0, 1, 2, 4, 5, 6]], clean[[0, 1, 2, 4, 5, 6]])


def test_bf16_computes_with_the_rounded_copy_and_returns_bf16():
    """Masters that bf16 rounds to whole numbers: the result must be that of the whole numbers, exactly."""
    case = Case(whole(1, 2, 7, 5), whole(2, 3, 12, 5), whole(3, 3, 12, 5), whole(4, 2, 3, 5), n=2, k=4, gate="none")
    off = replace(case, keys=case.keys * (1 + 2**-12), values=case.values * (1 + 2**-12))
    y = build(off, torch.bfloat16)(case.h[None].bfloat16())
    expected = case.reference()[0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[0].float(), expected.bfloat16().float())
    assert not torch.equal(off.reference()[0], expected)


def test_cap_raises_if_asked_and_never_binds_in_evaluation():
    case = Case(
        whole(1, 2, 13, 5), whole(2, 2, 21, 5), whole(3, 2, 21, 5), whole(4, 2, 3, 5), n=2, k=4, gate="none", cap=5
    )
    wanted = len(case.reference(cap=None)[1].active)
    assert wanted > 5
    stack = build(case, on_overflow="raise")
    with pytest.raises(ActiveRowsOverflow, match=rf"layer: .* 13 tokens activates {wanted} rows, .*cap = 5; "):
        stack(case.h[None])
    assert torch.equal(stack.eval()(case.h[None])[0], case.reference(cap=None)[0])
    assert stack.adapter.stats.micro_batches == 0


def test_kept_share_of_the_mass_is_counted():
    case = Case(
        whole(1, 2, 13, 5), whole(2, 2, 21, 5), whole(3, 2, 21, 5), whole(4, 2, 3, 5), n=2, k=4, gate="none", cap=5
    )
    stack = build(case)
    for _ in range(2):
        stack(case.h[None])
    mass, kept = stack.adapter.stats.mass.tolist()
    assert kept / mass == pytest.approx(case.reference()[1].kept_mass) and 0 < kept < mass
    assert stack.adapter.stats.active_rows == 2 * 5
