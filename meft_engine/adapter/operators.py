"""The adapter as two operators of torch's library, so that graph capture takes it as it is.

``meft::route`` chooses and ``meft::apply`` combines. What a backward needs of a choice goes from one to the other as
tensors, so that whoever recomputes (activation checkpointing, a compiler) recomputes the second from the choices of the
first. Both find their layer by a number: tables, locks and counters stay out of graphs.

Gradients of rows are not returned but handed to the tables, since autograd would want them dense. So that no compiler
takes the operator that does this for dead code, the gradient of an anchor comes out of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from meft_kernels.dispatch import Selection


class Routed(NamedTuple):
    """What :func:`route` gives to :func:`apply`. T′ is the number of tokens that are no padding."""

    gates: Tensor
    """[T′, n] float32, differentiable."""
    scores: Tensor
    """[T′, K] float32: raw scores of the picks. Their gradient is :func:`apply`'s affair."""
    tokens: Tensor
    """[T′] int64: where the tokens are in the flattened batch; [0] where all of them are real."""
    versions: Tensor
    """[2] int64, on the host: of the tables of keys and values."""
    load: Tensor
    """[N] float32: how many tokens of all ranks chose an expert; [0] where no loss depends on it."""
    logits: Tensor
    """[T′ · N] float32, or [0] where they have not been kept or nothing needs them."""
    experts: Tensor
    active: Tensor
    picks: Tensor
    slots: Tensor
    valid: Tensor
    count: Tensor
    """[1] int32: U; [0] where it is the number of elements of ``active``."""

    @property
    def selection(self) -> Selection:
        """The last six."""
        return Selection(*self[6:-1], self.count if self.count.numel() else None)


class Layer(Protocol):
    """What the operators ask of an adapter."""

    def choose(self, h: Tensor, router: Tensor, training: bool) -> Routed: ...

    def router_gradients(
        self, grad_gates: Tensor, h: Tensor, router: Tensor, routed: Routed
    ) -> tuple[Tensor, Tensor]: ...

    def combine(self, h: Tensor, routed: Routed, training: bool) -> Tensor: ...

    def hand_back(self, grad_y: Tensor, h: Tensor, routed: Routed, training: bool) -> tuple[Tensor, Tensor]: ...


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Layer) -> int:
    """The number by which the operators find a layer for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("meft::route", mutates_args=())
def route(h: Tensor, router: Tensor, layer: int, training: bool, experts_per_token: int, top_k: int) -> _Tensors:
    """Choose the experts and rows of h [..., d] by the router [N, d]; the result makes a :class:`Routed`."""
    return tuple(_layers[layer].choose(h, router, training))


@route.register_fake
def _(h: Tensor, router: Tensor, layer: int, training: bool, experts_per_token: int, top_k: int) -> _Tensors:
    context = torch.library.get_ctx()
    tokens, indexed, active, loaded, known, counted = (context.new_dynamic_size() for _ in range(6))

    def ids(*shape: Any) -> Tensor:
        return h.new_empty(shape, dtype=torch.int64)

    return (
        h.new_empty((tokens, experts_per_token), dtype=torch.float32),
        h.new_empty((tokens, top_k), dtype=torch.float32),
        ids(indexed),
        torch.empty(2, dtype=torch.int64),
        h.new_empty(loaded, dtype=torch.float32),
        h.new_empty(known, dtype=torch.float32),
        ids(tokens, experts_per_token),
        ids(active),
        ids(tokens, top_k),
        ids(tokens, top_k),
        h.new_empty((tokens, top_k), dtype=torch.bool),
        h.new_empty(counted, dtype=torch.int32),
    )


@torch.library.custom_op("meft::route_backward", mutates_args=())
def _route_backward(
    grad_gates: Tensor, h: Tensor, router: Tensor, routed: Sequence[Tensor], layer: int
) -> tuple[Tensor, Tensor]:
    return _layers[layer].router_gradients(grad_gates, h, router, Routed(*routed))


@_route_backward.register_fake
def _(grad_gates: Tensor, h: Tensor, router: Tensor, routed: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(router)


def _keep_for_route(ctx: Any, inputs: tuple, output: _Tensors) -> None:
    h, router, ctx.layer, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, router, *output)


def _back_through_route(ctx: Any, grad_gates: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, router, *routed = ctx.saved_tensors
    if grad_gates is None:
        return (None,) * 6
    return *_route_backward(grad_gates, h, router, routed, ctx.layer), None, None, None, None


route.register_autograd(_back_through_route, setup_context=_keep_for_route)


@torch.library.custom_op("meft::apply", mutates_args=())
def apply(h: Tensor, routed: Sequence[Tensor], anchors: Sequence[Tensor], layer: int, training: bool) -> Tensor:
    """``y_t = Σ_j z_tj B_j`` over the picks j of token t, where ``z_tj = gate · (x_t · A_j)``.

    Args:
        h: [..., d], of any float dtype, which y has too. routed: the fields of a :class:`Routed`.
        anchors: get zeros for a gradient. One that requires grad is what makes autograd come back here where neither
            h nor the gates do.
    """
    return _layers[layer].combine(h, Routed(*routed), training)


@apply.register_fake
def _(h: Tensor, routed: Sequence[Tensor], anchors: Sequence[Tensor], layer: int, training: bool) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@torch.library.custom_op("meft::apply_backward", mutates_args=())
def _apply_backward(
    grad_y: Tensor, h: Tensor, routed: Sequence[Tensor], layer: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_h, grad_gates = _layers[layer].hand_back(grad_y, h, Routed(*routed), training)
    return grad_h, grad_gates, grad_y.new_zeros(())


@_apply_backward.register_fake
def _(grad_y: Tensor, h: Tensor, routed: Sequence[Tensor], layer: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(routed[0]), grad_y.new_empty(())


def _keep_for_apply(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h, routed, anchors, ctx.layer, ctx.training = inputs
    ctx.parts = len(routed)
    # The selection too is saved, not merely kept: it shall die with the backward, not with the output.
    ctx.save_for_backward(h, *routed, *anchors)


def _back_through_apply(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    h, *rest = ctx.saved_tensors
    routed, anchors = rest[: ctx.parts], rest[ctx.parts :]
    grad_h, grad_gates, zero = _apply_backward(grad_y, h, routed, ctx.layer, ctx.training)
    others = [None] * (ctx.parts - 1)
    return (
        grad_h,
        [grad_gates, *others],
        [torch.zeros_like(anchor) + zero.to(anchor.dtype) for anchor in anchors],
        None,
        None,
    )


apply.register_autograd(_back_through_apply, setup_context=_keep_for_apply)
