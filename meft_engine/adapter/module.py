"""`SparseAdapter`: the module that stands beside one FFN and adds its rows' contribution to the FFN's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meft_engine.adapter.autograd import ApplyRows
from meft_engine.adapter.balance import AddLoss, auxiliary_loss, expert_load, rebalance
from meft_engine.adapter.calls import CallTracker, recomputing
from meft_engine.adapter.routing import RoutingStats, choose_experts, choose_rows, gate
from meft_engine.adapter.switch import Switch
from meft_engine.config import MeftConfig
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.parallel.ranks import Ranks
from meft_engine.phases import phase
from meft_engine.zero_parameters import full_shape
from meft_kernels.dispatch import Overflow, Selection, token_passes


class SparseAdapter(nn.Module):
    """A sparse parallel adapter, as ``kernels/reference.py`` defines it.

    The router is an ordinary parameter (DeepSpeed's to own); keys and values are partially offloaded tensors.

    Args:
        name: of the FFN, by which rows are stored. config: the block. router: [N, d] initial weights.
        keys, values: the tables [r, d]. calls: the tracker of the layer's stack.
        ranks: those that train together, over all of which inputs are centered and experts balanced.
        switch: shared with the same adapter's other layers; ``None``: one of its own, which is on.
    """

    def __init__(
        self,
        name: str,
        config: MeftConfig,
        router: Tensor,
        keys: PartiallyOffloadedTensor,
        values: PartiallyOffloadedTensor,
        calls: CallTracker,
        ranks: Ranks | None = None,
        switch: Switch | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.switch = switch or Switch()
        self.router = nn.Parameter(router, requires_grad=keys.trainable and config.trains_routers)
        self.keys, self.values = keys, values
        self.stats = RoutingStats()
        self._calls, self._config = calls, config
        self._ranks = ranks or Ranks()
        self.hooks: list[RemovableHandle] = []
        self.observers: list[Callable[[Selection, Tensor, Overflow], None]] = []
        """Called after each selection (not when one is replayed) with it, the activations [T, K] of its picks, and what
        the cap did."""
        # [N] float32, added to logits in the choice of experts; not a buffer, which would be cast and counted.
        bias = torch.zeros(router.shape[0], device=keys.device) if config.router.balance == "bias" else None
        self.__dict__["expert_bias"] = bias
        # [d] float32, subtracted from inputs; zeros until the first training micro-batch, and not a buffer as above.
        center = torch.zeros(router.shape[1], device=keys.device) if config.adapter.center_inputs else None
        self.__dict__["center"] = center
        self._center_known = False
        # What the training loss is multiplied by before its backward, for losses that are added here.
        self.__dict__["loss_factor"] = lambda: 1.0
        # Makes autograd visit ApplyRows where no input requires grad (a first layer over a frozen base, gate "none").
        # A buffer or parameter would be cast and counted; this is neither.
        self.__dict__["_tripwire"] = torch.zeros((), requires_grad=keys.trainable)

    def add_anchor(self) -> nn.Parameter:
        """A parameter [1] that gets zeros for a gradient, for an optimizer group that would be empty without it."""
        # The module's own, not of a list in it: ZeRO stage 3 brings a module's own parameters together for its forward.
        self.register_parameter(f"anchor{len(self.anchors())}", nn.Parameter(torch.zeros(1)))
        return self.anchors()[-1]

    def anchors(self) -> list[nn.Parameter]:
        """What :meth:`add_anchor` has added."""
        return [parameter for name, parameter in self.named_parameters(recurse=False) if name.startswith("anchor")]

    @torch.compiler.disable
    def forward(self, h: Tensor) -> Tensor:
        """What the adapter adds to ``FFN(h)``: h [..., d] of any float dtype; the result has its shape and dtype."""
        # The definition scores in fp32, whatever autocast would prefer.
        with torch.autocast(h.device.type, enabled=False):
            return self._contribution(h)

    def _contribution(self, h: Tensor) -> Tensor:
        adapter = self._config.adapter
        replayed = self._calls.replay(self, h) if recomputing() else None
        tokens = replayed.tokens if replayed else self._calls.real_tokens(h.shape)
        flat = h.reshape(-1, h.shape[-1])
        x = (flat if tokens is None else flat[tokens]).float()
        if self.center is not None:
            if self.training and not replayed and not self._center_known:
                self._measure_center(x.detach())
            x = x - self.center

        with phase("route"):
            logits = F.linear(x, self.router.float())
            if replayed:
                experts = replayed.selection.experts
            else:
                experts = choose_experts(logits, adapter.experts_per_token, self.expert_bias)
            gates = gate(logits.gather(1, experts), adapter.gate)
            load = expert_load(experts, logits.shape[1]) if self.training else None
            if replayed:
                selection = replayed.selection
                for table, version in zip((self.keys, self.values), replayed.versions, strict=True):
                    table.require_version(version)
                with torch.no_grad(), self.keys.rows_at(selection.active, latest=self._latest()) as keys:
                    scores = token_passes(x.device).score_picks(x, keys, selection)
            else:
                selection, scores = self._select(x, logits, experts, gates, load)
                self._calls.record(self, h, tokens, selection, (self.keys.version, self.values.version))

        with phase("combine"):
            y = ApplyRows.apply(
                x, gates, scores, selection, self.keys, self.values, self._latest(), self._tripwire, *self.anchors()
            )
        extra = None
        if load is not None and y.requires_grad:
            if self._config.router.balance == "loss":
                load = self._ranks.sum_counts(load)
            extra = auxiliary_loss(self._config.router, logits, load)
        if extra is not None:
            y = AddLoss.apply(y, extra, self.loss_factor)
        y = y.to(h.dtype)
        if tokens is not None:
            y = torch.zeros_like(flat).index_copy(0, tokens, y)
        return y.view(h.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAdapter:
        """What ``Module.to`` and the like call. Without an engine, which says where the model computes, that is where
        the router has gone; nothing but the router is ever cast."""
        super()._apply(fn, recurse)
        if not self.keys.trainable:
            device = self.router.device
            for table in (self.keys, self.values):
                table.serve(device)
            for kept in ("center", "expert_bias"):
                if self.__dict__[kept] is not None:
                    self.__dict__[kept] = self.__dict__[kept].to(device)
        return self

    def set_center(self, center: Tensor) -> None:
        """Take a center [d] that was measured before; zeros: none was."""
        self.center.copy_(center)
        self._center_known = bool(center.any())

    def _measure_center(self, x: Tensor) -> None:
        """Take the mean of x [T, d] of all ranks, unless there is no token, or one that would spoil every later
        forward."""
        count, mean = x.shape[0], x.mean(0)
        if self._ranks.size > 1:
            total = self._ranks.sum(torch.cat([x.double().sum(0), x.new_tensor([count]).double()]))
            count, mean = int(total[-1]), (total[:-1] / total[-1]).float()
        if count and bool(mean.isfinite().all()):
            self.set_center(mean)

    def after_step(self, *, applied: bool) -> None:
        """After an optimizer step: adjust the bias where the block asks for it, unless the step was skipped."""
        load, self.stats.step_load = self.stats.step_load, None
        if applied and self.expert_bias is not None and load is not None:
            load = self._ranks.sum_counts(load.to(self.expert_bias.device))
            rebalance(self.expert_bias, load, self._config.router.balance_coef)

    def _select(
        self, x: Tensor, logits: Tensor, experts: Tensor, gates: Tensor, load: Tensor | None
    ) -> tuple[Any, Tensor]:
        limits = self._config.active_rows
        with self.keys.reading(latest=self._latest()) as keys:
            selection, scores, overflow = choose_rows(
                self.name,
                x,
                logits,
                experts,
                gates,
                keys,
                top_k=self._config.adapter.top_k,
                cap=limits.cap if self.training else None,
                on_overflow=limits.on_overflow,
            )
        for observe in self.observers:
            observe(selection, scores * gates.detach().gather(1, selection.slots), overflow)
        if self.training:
            self.stats.count(selection.active.numel(), overflow, load)
        return selection, scores

    def _latest(self) -> bool:
        """Evaluation reads nothing stale, whatever training may."""
        return not self.training

    def extra_repr(self) -> str:
        """Shape of the adapter, for ``print(model)``."""
        adapter = self._config.adapter
        return (
            f"rows={self.keys.rows}, width={self.keys.width}, experts={full_shape(self.router)[0]}, "
            f"experts_per_token={adapter.experts_per_token}, top_k={adapter.top_k}, gate={adapter.gate}"
        )


def listen(adapter: SparseAdapter, entry: nn.Module, exit: nn.Module) -> list[RemovableHandle]:
    """Let the adapter read what ``entry`` gets and add to what ``exit`` gives; often they are one module.

    While its switch is off, nothing happens.
    """
    if entry is exit:

        def add(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            return _added(output, adapter(_first(args, kwargs))) if adapter.switch.on else None

        return [entry.register_forward_hook(add, with_kwargs=True)]
    # Between the two nothing else of this layer runs, so one place is enough.
    pending: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pending[:] = [_first(args, kwargs)] if adapter.switch.on else []

    return [
        entry.register_forward_pre_hook(keep, with_kwargs=True),
        exit.register_forward_hook(
            lambda module, args, output: _added(output, adapter(pending.pop())) if pending else None
        ),
    ]


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _added(output: Any, contribution: Tensor) -> Any:
    """An FFN's output plus the contribution; some blocks of experts give their router's logits besides."""
    if isinstance(output, tuple):
        return (output[0] + contribution, *output[1:])
    return output + contribution
