"""One call of a layer stack: its padding mask, and the selections that activation checkpointing must replay.

A checkpointed layer runs twice: in the forward, and again inside the backward. The second run must use the first one's
selection, since a rounding difference could flip a choice. Selections belong to a :class:`Call`, which lives as long as
the autograd graph of the call's output and is emptied when its backward ends.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meft_engine.adapter.switch import Switch
from meft_kernels.sparse import Selection

_SAME_CALL = 0.05
_NO_REPEAT = (
    "a MEFT adapter ran inside a backward, but repeats no forward in flight; run forwards outside of backward, and "
    "checkpoint layers rather than the whole model"
)


@dataclass(frozen=True)
class Record:
    """What one adapter did in one call."""

    tokens: Tensor | None
    """[T] int64: positions of the real tokens in the flattened batch; ``None``: all are real."""
    selection: Selection
    versions: tuple[int, ...]
    """Of the tables that the selection was made from."""
    load: Tensor | None
    """[N] float32: of the experts, where a loss depends on it."""


@dataclass(eq=False)
class Call:
    """A forward of a stack that is running, or whose backward is still to come."""

    mask: Tensor | None = None
    real: dict[torch.Size, Tensor | None] = field(default_factory=dict)
    """What :meth:`CallTracker.real_tokens` has found for hidden states of a shape."""
    records: dict[nn.Module, list[tuple[torch.Size, Tensor, Record]]] = field(default_factory=dict)
    """Of each adapter, by the shapes and fingerprints of its inputs."""


class CallTracker:
    """Watches one layer stack through forward hooks. Shared by the layers of one adapter in the stack.

    Args:
        stack: whose forward gets the attention mask.
        switch: the adapter's; while it is off, calls are not looked at. ``None``: one of its own, which is on.
    """

    def __init__(self, stack: nn.Module, switch: Switch | None = None) -> None:
        self._switch = switch or Switch()
        self._running: list[Call] = []
        self._live: weakref.WeakSet[Call] = weakref.WeakSet()
        self._signature = inspect.signature(stack.forward)
        self.hooks = [
            stack.register_forward_pre_hook(self._enter, with_kwargs=True),
            stack.register_forward_hook(self._leave, always_call=True),
        ]

    def real_tokens(self, shape: torch.Size) -> Tensor | None:
        """[T] positions of the real tokens of hidden states of ``shape`` [batch, seq, d] or [batch · seq, d].

        ``None``: all are real.

        Raises:
            ValueError: if the attention mask does not fit the hidden states.
        """
        call = self._running[-1] if self._running else Call()
        # Once for all layers: whether there is padding decides how large tensors are, which the host waits for.
        if shape not in call.real:
            call.real[shape] = self._find_real(call.mask, shape) if call.mask is not None else None
        return call.real[shape]

    @staticmethod
    def _find_real(mask: Tensor, shape: torch.Size) -> Tensor | None:
        if len(shape) == 2 and shape[0] % mask.shape[0] == 0:
            shape = torch.Size((mask.shape[0], shape[0] // mask.shape[0], shape[1]))
        if len(shape) != 3 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} does not cover hidden states of shape {tuple(shape)}"
            )
        real = mask[:, mask.shape[1] - shape[1] :].flatten() != 0
        return None if bool(real.all()) else real.nonzero().flatten()

    def record(self, adapter: nn.Module, h: Tensor, record: Record) -> None:
        """Remember a selection for as long as it may have to be replayed."""
        if self._running:
            self._running[-1].records.setdefault(adapter, []).append((h.shape, _fingerprint(h), record))

    def replay(self, adapter: nn.Module, h: Tensor) -> Record:
        """The record of the forward that this recomputation repeats.

        Several forwards may be in flight. The recomputed ``h`` equals the first run's up to rounding, so the record
        whose fingerprint is nearest is the right one; equal fingerprints mean equal selections.

        Raises:
            RuntimeError: if no forward in flight had such an ``h``.
        """
        fingerprint = _fingerprint(h)
        scale = fingerprint.norm() + torch.finfo(torch.float32).tiny
        known = [entry for call in self._live for entry in call.records.get(adapter, ()) if entry[0] == h.shape]
        distances = [torch.nan_to_num((print_ - fingerprint).norm() / scale) for _, print_, _ in known]
        if len(known) == 1:
            # Nothing to choose: the device can find out by itself whether it is the one, and the host goes on.
            torch._assert_async(distances[0] <= _SAME_CALL, _NO_REPEAT)
            return known[0][-1]
        found = [float(distance) for distance in distances]
        if not found or min(found) > _SAME_CALL:
            raise RuntimeError(_NO_REPEAT)
        return known[found.index(min(found))][-1]

    # Neither is for a compiler to trace: it would see through what they keep, and lose some of it.

    @torch.compiler.disable
    def _enter(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        call = Call()
        # Before anything that may raise, since `_leave` is called even then.
        self._running.append(call)
        if not self._switch.on:
            return None
        bound = self._signature.bind_partial(*args, **kwargs)
        call.mask = _usable_mask(bound.arguments.get("attention_mask", kwargs.get("attention_mask")))
        self._live.add(call)
        # Reentrant checkpointing builds no graph for a layer of which no input requires grad, as the first one's
        # never does over a frozen base.
        embeds = bound.arguments.get("inputs_embeds")
        if stack.training and torch.is_grad_enabled() and embeds is not None and not embeds.requires_grad:
            tracked = embeds.detach().requires_grad_()
            # In its place among arguments that stay as they were passed: wrappers of `forward` look for theirs by name.
            args = tuple(tracked if value is embeds else value for value in args)
            return args, {name: tracked if value is embeds else value for name, value in kwargs.items()}
        return None

    @torch.compiler.disable
    def _leave(self, stack: nn.Module, args: tuple, output: Any) -> None:
        call = self._running.pop()
        node = _grad_node(output)
        if node is None:
            return
        # The node's metadata is the one place that lives exactly as long as the graph does.
        node.metadata["meft_call"] = call
        reference = weakref.ref(call)
        node.register_prehook(lambda _: _empty_when_backward_ends(reference))


def recomputing() -> bool:
    """Whether this code runs inside a backward, that is, as the second run of a checkpointed layer."""
    return torch._C._current_graph_task_id() != -1


def _usable_mask(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"a {mask.dim()}-dimensional tensor" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {kind}, from which padding cannot be told; pass a [batch, seq] mask (with generate, "
            "use the default dynamic cache), or none where there is no padding"
        )
    return mask


def _fingerprint(h: Tensor) -> Tensor:
    """One number a token, since two forwards in flight may differ in a single one: h [..., d] along a fixed direction
    that nothing in a model singles out."""
    direction = torch.arange(1, h.shape[-1] + 1, device=h.device, dtype=torch.float32).cos()
    return h.detach().reshape(-1, h.shape[-1]).float() @ direction


def _grad_node(output: Any) -> Any:
    """The autograd node of the first differentiable tensor of a model's output."""
    if isinstance(output, Tensor):
        return output.grad_fn
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return next((node for part in parts if (node := _grad_node(part)) is not None), None)


def _empty_when_backward_ends(reference: weakref.ref[Call]) -> None:
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return
    call = reference()
    if call is not None:
        torch.autograd.Variable._execution_engine.queue_callback(call.records.clear)
