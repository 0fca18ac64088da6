"""`SparseAdapter`: the module that stands beside one FFN and adds its rows' contribution to the FFN's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meft_engine.adapter import operators
from meft_engine.adapter.balance import auxiliary_gradient, rebalance
from meft_engine.adapter.calls import CallTracker, Record, recomputing
from meft_engine.adapter.routing import RoutingStats, choose_rows
from meft_engine.adapter.switch import Switch
from meft_engine.config import MeftConfig
from meft_engine.offload.gradient_slots import GradientSlots
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.parallel.ranks import Ranks
from meft_engine.phases import phase
from meft_engine.zero_parameters import full_shape
from meft_kernels.dispatch import Chosen, Inputs, Overflow, Selection, token_passes


class SparseAdapter(nn.Module):
    """A sparse parallel adapter, as ``kernels/reference.py`` defines it.

    The router is an ordinary parameter (DeepSpeed's to own); keys and values are partially offloaded tensors.

    Args:
        name: of the FFN, by which rows are stored. config: the block. router: [N, d] initial weights.
        keys, values: the tables [r, d]. calls: the tracker of the layer's stack.
        ranks: those that train together, over all of which inputs are centered and experts balanced.
        switch: shared with the same adapter's other layers; ``None``: one of its own, which is on.
        gradient_slots: of both tables; ``None``: gradients go to the host at once.
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
        gradient_slots: GradientSlots | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.switch = switch or Switch()
        self.gradient_slots = gradient_slots
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
        # Whether the micro-step that is running ends an accumulation window.
        self.__dict__["at_boundary"] = lambda: False
        self._number = operators.register(self)
        # Makes autograd come back where no input requires grad (a first layer over a frozen base, gate "none").
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

    def forward(self, h: Tensor) -> Tensor:
        """What the adapter adds to ``FFN(h)``: h [..., d] of any float dtype; the result has its shape and dtype."""
        adapter, training = self._config.adapter, self.training
        routed = operators.route(h, self.router, self._number, training, adapter.experts_per_token, adapter.top_k)
        return operators.apply(h, routed, [self._tripwire, *self.anchors()], self._number, training)

    # What the operators ask for: without gradients, and in fp32 whatever autocast would prefer.

    def choose(self, h: Tensor, router: Tensor, training: bool) -> operators.Routed:
        """Experts and rows of h [..., d]: chosen, or in the second run of a checkpointed layer those of the first."""
        adapter = self._config.adapter
        with torch.autocast(h.device.type, enabled=False), phase("route"):
            replayed = self._calls.replay(self, h) if recomputing() else None
            tokens = replayed.tokens if replayed else self._calls.real_tokens(h.shape)
            given = self._inputs(h, tokens, measure=training and replayed is None)
            passes = token_passes(h.device)
            if replayed:
                selection, versions, load = replayed.selection, replayed.versions, replayed.load
                logits = passes.logits_of(given, router)
                gates = passes.gates_of(logits.gather(1, selection.experts), adapter.gate)
                for table, version in zip((self.keys, self.values), versions, strict=True):
                    table.require_version(version)
                with self.keys.rows_at(selection.active, count=selection.count, latest=not training) as keys:
                    scores = passes.score_picks(given.x, keys, selection)
            else:
                chosen = passes.choose_experts(given, router, adapter.experts_per_token, adapter.gate, self.expert_bias)
                gates, logits, versions = chosen.gates, chosen.logits, (self.keys.version, self.values.version)
                selection, scores = self._select(given, chosen, training)
                load = self._load(chosen) if training and self._config.router.adds_losses else None
                self._calls.record(self, h, Record(tokens, selection, versions, load))
        # Copies of what is remembered: a compiler uses the memory of an operator's results again.
        active = selection.active.clone()
        for table in (self.keys, self.values):
            table.expect(active, selection.count, latest=not training, keep=training)
        return operators.Routed(
            gates,
            scores,
            tokens=selection.active.new_empty(0) if tokens is None else tokens.clone(),
            versions=torch.tensor(versions),
            load=scores.new_empty(0) if load is None else load.clone(),
            logits=scores.new_empty(0) if load is None or logits is None else logits.view(-1),
            active=active,
            count=selection.slots.new_empty(0, dtype=torch.int32)
            if selection.count is None
            else selection.count.clone(),
            **{name: getattr(selection, name).clone() for name in ("experts", "picks", "slots", "valid")},
        )

    def router_gradients(
        self, grad_gates: Tensor, h: Tensor, router: Tensor, routed: operators.Routed
    ) -> tuple[Tensor, Tensor]:
        """Gradients of h [..., d] and of the router [N, d], by those of the gates [T, n] and by the block's losses."""
        config, passes, num_experts = self._config, token_passes(h.device), router.shape[0]
        with torch.autocast(h.device.type, enabled=False):
            given = self._inputs(h, self._real(routed, h))
            grad = passes.logit_gradients(routed.experts, routed.gates, config.adapter.gate, grad_gates, num_experts)
            if routed.load.numel():
                logits = routed.logits if routed.logits.numel() else passes.logits_of(given, router)
                added = auxiliary_gradient(config.router, logits.view(-1, num_experts), routed.load)
                if added is not None:
                    grad.add_(added, alpha=self.loss_factor())
            return self._spread(grad @ router.float(), h, routed), (grad.T @ given.x).to(router.dtype)

    def combine(self, h: Tensor, routed: operators.Routed, training: bool) -> Tensor:
        """``y`` [..., d]: each token's sum of its rows' values."""
        selection, passes = routed.selection, token_passes(h.device)
        with torch.autocast(h.device.type, enabled=False), phase("combine"):
            weights = routed.scores * passes.picked_gates(routed.gates, selection)
            with self.values.rows_at(
                selection.active, count=selection.count, latest=not training, keep=training
            ) as rows:
                return self._spread(passes.combine_rows(weights, rows, selection), h, routed)

    def hand_back(self, grad_y: Tensor, h: Tensor, routed: operators.Routed, training: bool) -> tuple[Tensor, Tensor]:
        """Give the tables the gradients of their rows, and the caller those of h [..., d] and of the gates [T, n]."""
        selection, passes = routed.selection, token_passes(h.device)
        with torch.autocast(h.device.type, enabled=False), phase("row_gradients"):
            tokens, active, count = self._real(routed, h), selection.active, selection.count
            given = self._inputs(h, tokens)
            flat = grad_y.reshape(-1, grad_y.shape[-1])
            keys_version, values_version = routed.versions.tolist()
            places = self.gradient_slots.places(active, count) if self.gradient_slots is not None else None
            with (
                self.values.rows_at(
                    active, values_version, count=count, latest=not training, keep=training, backward=True
                ) as value_rows,
                self.keys.rows_at(
                    active, keys_version, count=count, latest=not training, keep=training, backward=True
                ) as key_rows,
            ):
                found = passes.gradients(
                    flat if tokens is None else flat[tokens],
                    given,
                    routed.scores,
                    routed.gates,
                    value_rows,
                    key_rows,
                    selection,
                    self.values.room_for_gradients,
                    places,
                )
            of_values, of_keys = found.squared_norms or (None, None)
            rows, count = (active, count) if places is None else (places.rows, places.count)
            self.values.accumulate(rows, found.values, of_values, count)
            self.keys.accumulate(rows, found.keys, of_keys, count)
            if places is not None and self.at_boundary():
                self.gradient_slots.flush()  # while the backward of earlier layers goes on
            return self._spread(found.x, h, routed), found.gates

    def _inputs(self, h: Tensor, tokens: Tensor | None, *, measure: bool = False) -> Inputs:
        """What routing and scoring read of h [..., d]."""
        flat = h.reshape(-1, h.shape[-1])
        flat = flat if tokens is None else flat[tokens]
        if measure and self.center is not None and not self._center_known:
            self._measure_center(flat.float())
        return token_passes(h.device).inputs(flat, self.center)

    @staticmethod
    def _real(routed: operators.Routed, h: Tensor) -> Tensor | None:
        """[T′]: where the real tokens are in the flattened batch; ``None``: all are."""
        return None if routed.gates.shape[0] == h.numel() // h.shape[-1] else routed.tokens

    def _spread(self, of_tokens: Tensor, h: Tensor, routed: operators.Routed) -> Tensor:
        """What was found for the real tokens [T′, d], as h [..., d] has it; zeros for padding."""
        tokens, of_tokens = self._real(routed, h), of_tokens.to(h.dtype)
        if tokens is not None:
            of_tokens = of_tokens.new_zeros(h.numel() // h.shape[-1], h.shape[-1]).index_copy_(0, tokens, of_tokens)
        return of_tokens.view(h.shape)

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

    def _load(self, chosen: Chosen) -> Tensor:
        """[N] float32: how many tokens chose an expert, on all ranks where a loss is to even it out."""
        load = chosen.counts.float()
        return self._ranks.sum_counts(load) if self._config.router.balance == "loss" else load

    def _select(self, given: Inputs, chosen: Chosen, training: bool) -> tuple[Selection, Tensor]:
        limits = self._config.active_rows
        with self.keys.reading(latest=not training) as keys:
            selection, scores, overflow = choose_rows(
                self.name,
                given,
                keys,
                chosen,
                top_k=self._config.adapter.top_k,
                cap=limits.cap if training else None,
                on_overflow=limits.on_overflow,
            )
        for observe in self.observers:
            observe(selection, scores * chosen.gates.gather(1, selection.slots), overflow)
        if training:
            self.stats.count(given.x.shape[0], selection.number, overflow, chosen.counts.float())
        return selection, scores

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
