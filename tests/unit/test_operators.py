"""The adapter's operators: what torch's library asks of an operator, and graphs that a compiler has made of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from meft_engine.adapter import operators
from meft_engine.adapter.calls import CallTracker
from meft_engine.adapter.module import SparseAdapter
from meft_engine.config import MeftConfig
from meft_engine.offload.tensor import PartiallyOffloadedTensor

ROWS, WIDTH, EXPERTS = 24, 12, 4


class Stack(nn.Module):
    """Two layers, each a projection with an adapter beside it; the first has no input that requires grad."""

    def __init__(self, checkpointed: bool, **adapter: object) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        block = {"rows": ROWS, "num_experts": EXPERTS, "experts_per_token": 2, "top_k": 5, **adapter}
        config = MeftConfig.from_block({"adapter": block, "active_rows": {"cap": 11}})
        calls, self.checkpointed = CallTracker(self), checkpointed
        self.base, self.adapters = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            tables = []
            for kind in ("keys", "values"):
                table = PartiallyOffloadedTensor(
                    kind, ROWS, WIDTH, device="cpu", compute_dtype=torch.float32, resident=kind == "keys"
                )
                table.fill(torch.randn(ROWS, WIDTH, generator=generator) / 4)
                tables.append(table)
            router = torch.randn(EXPERTS, WIDTH, generator=generator)
            self.adapters.append(SparseAdapter("layer", config, router, *tables, calls))
            self.base.append(nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False))
            with torch.no_grad():
                self.base[-1].weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / 4)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = inputs_embeds
        for base, adapter in zip(self.base, self.adapters, strict=True):

            def layer(x: Tensor, base: nn.Module = base, adapter: nn.Module = adapter) -> Tensor:
                return x + torch.nn.functional.gelu(base(x)) + adapter(x)

            h = checkpoint(layer, h, use_reentrant=False) if self.checkpointed else layer(h)
        return h

    def gradients(self) -> dict[str, Tensor]:
        """Of rows and routers; they start from nothing afterwards."""
        found = {}
        for index, adapter in enumerate(self.adapters):
            found[f"{index} router"], adapter.router.grad = adapter.router.grad, None
            for kind, table in (("keys", adapter.keys), ("values", adapter.values)):
                gradient = table.gradient()
                found[f"{index} {kind} rows"], found[f"{index} {kind}"] = gradient.rows, gradient.grad.clone()
                table.clear_gradient()
        return {name: grad for name, grad in found.items() if grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(tokens: int = 7) -> tuple[Tensor, Tensor]:
    """Of two sequences, with padding in one."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :2] = 0
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)), mask


def trained(stack: nn.Module, plain: Stack, tokens: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and all gradients of a forward and backward."""
    h, mask = inputs(tokens)
    y = stack(h, attention_mask=mask)
    y.square().sum().backward()
    return y.detach(), plain.gradients()


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("gate", ["softmax", "none"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_a_compiled_stack_trains_as_it_does_uncompiled(backend, checkpointed, gate):
    """At two lengths, with gradients of rows that no graph shows; the selection is made once a forward."""
    plain, stack = Stack(False, gate=gate), Stack(checkpointed, gate=gate)
    compiled = torch.compile(stack, backend=backend)
    for tokens in (7, 9, 7):
        expected = trained(plain, plain, tokens)
        assert_same(trained(compiled, stack, tokens), expected)
    for one, other in zip(stack.adapters, plain.adapters, strict=True):
        assert one.stats.micro_batches == other.stats.micro_batches == 3
        assert one.stats.active_rows == other.stats.active_rows


def test_an_adapter_breaks_no_graph():
    stack = Stack(False).adapters[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, backend=counter, fullgraph=True)
    h = inputs()[0].requires_grad_()
    torch.testing.assert_close(compiled(h), stack(h))
    compiled(h).sum().backward()
    assert counter.frame_count == 1 and h.grad.any() and stack.values.gradient().grad.any()


def test_nothing_that_is_remembered_is_given_out(monkeypatch):
    """A compiler uses the memory of an operator's results again; what a replay needs must not lie there."""
    stack, remembered, given = Stack(False), [], []
    choose, (h, mask) = SparseAdapter.choose, inputs()
    monkeypatch.setattr(stack.adapters[0]._calls, "record", lambda adapter, h, made: remembered.append(made))
    monkeypatch.setattr(SparseAdapter, "choose", lambda *args: given.append(choose(*args)) or given[-1])
    stack(h, attention_mask=mask)
    assert len(given) == len(remembered) == 2
    for routed, made in zip(given, remembered, strict=True):
        addresses = {part.data_ptr() for part in routed}
        kept = (made.tokens, made.load, *vars(made.selection).values())
        assert addresses.isdisjoint(part.data_ptr() for part in kept if part is not None)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_operators_are_what_torch_asks_of_them(requires_grad):
    adapter = Stack(False).adapters[0]
    h = inputs()[0].requires_grad_(requires_grad)
    arguments = (h, adapter.router, adapter._number, True, 2, 5)
    torch.library.opcheck(operators.route, arguments)
    routed = [
        t.detach().requires_grad_(t.is_floating_point() and i == 0) for i, t in enumerate(operators.route(*arguments))
    ]
    torch.library.opcheck(operators.apply, (h, routed, [torch.zeros((), requires_grad=True)], adapter._number, True))


def test_layers_are_forgotten_when_they_die():
    number = Stack(False).adapters[0]._number
    with pytest.raises(KeyError):
        operators.route(inputs()[0], torch.randn(EXPERTS, WIDTH), number, True, 2, 5)
