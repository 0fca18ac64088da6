"""What the engine is compared with, written without its code: dense models that autograd differentiates, and AdamW in
float64 that steps only touched rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meft_kernels import reference
from tests.integration.engines import router_values


class DenseParallelAdapter(nn.Module):
    """``FFN(h) + relu(h Aᵀ) B`` with A and B as ordinary parameters."""

    def __init__(self, ffn: nn.Module, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.ffn = ffn
        self.keys, self.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())

    def forward(self, h: Tensor) -> Tensor:
        return self.ffn(h) + torch.relu(h @ self.keys.T) @ self.values


class ReferenceAdapter(nn.Module):
    """``FFN(h)`` plus the plain definition of the adapter, keys, values and router as ordinary parameters."""

    def __init__(self, ffn: nn.Module, keys: Tensor, values: Tensor, router: Tensor, shape: dict[str, Any]) -> None:
        super().__init__()
        self.ffn, self.shape = ffn, shape
        self.keys, self.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())
        self.router = nn.Parameter(router.clone())

    def forward(self, h: Tensor) -> Tensor:
        y, _ = reference.adapter(h.reshape(-1, h.shape[-1]), self.keys, self.values, self.router, **self.shape)
        return self.ffn(h) + y.view(h.shape)


def dense_twin(model: nn.Module, engine: Any) -> nn.Module:
    """The frozen ``model`` with dense parallel adapters in the present state of the engine's rows."""
    return _twin(
        model,
        engine,
        lambda name, ffn, adapter: DenseParallelAdapter(ffn, adapter.keys.master, adapter.values.master),
    )


def reference_twin(model: nn.Module, engine: Any) -> nn.Module:
    """The frozen ``model`` with reference adapters in the present state of the engine's rows, routers and centers."""
    block, routers = engine.meft_adapters.config.adapter, router_values(engine)
    shape = {"experts_per_token": block.experts_per_token, "top_k": block.top_k, "gate": block.gate}
    return _twin(
        model,
        engine,
        lambda name, ffn, adapter: ReferenceAdapter(
            ffn,
            adapter.keys.master,
            adapter.values.master,
            routers[name],
            {**shape, "center": adapter.center.cpu().clone() if adapter.center is not None else None},
        ),
    )


def _twin(model: nn.Module, engine: Any, make: Callable[[str, nn.Module, Any], nn.Module]) -> nn.Module:
    model.requires_grad_(False)
    for name, adapter in engine.meft_adapters.adapters.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, model.get_submodule(name), adapter))
    return model


def twin_parts(twin: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The twin's parameters of a kind (``keys``, ``values``, ``router``), named as the engine names its own."""
    found = {name: getattr(m, kind) for name, m in twin.named_modules() if hasattr(m, "keys") and hasattr(m, "ffn")}
    return found if kind == "router" else {f"{name}/{kind}": part for name, part in found.items()}


def twin_rows(twin: nn.Module) -> dict[str, nn.Parameter]:
    """The twin's keys and values, named as the engine's tables."""
    return {**twin_parts(twin, "keys"), **twin_parts(twin, "values")}


def global_norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all elements of all tensors, in float64."""
    return sum(float(g.double().square().sum()) for g in gradients) ** 0.5


def clip_factor(norm: float, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


class LazyAdamW:
    """AdamW in float64, one row at a time: a row that gets no gradient neither moves, nor decays, nor ages."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self.weights = {name: tensor.double().clone() for name, tensor in start.items()}
        self.m = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.steps = {name: [0] * len(w) for name, w in self.weights.items()}

    def step(
        self,
        gradients: dict[str, tuple[Tensor, Tensor]],
        settings: Callable[[str], dict[str, Any]],
        factor: float = 1.0,
    ) -> None:
        """Update the rows named in ``gradients``.

        Args:
            gradients: for each tensor the touched rows and their gradients.
            settings: of a tensor's name: ``lr``, ``betas``, ``eps``, ``weight_decay``. factor: of the gradients.
        """
        for name, (rows, grads) in gradients.items():
            own = settings(name)
            (beta1, beta2), lr = own["betas"], float(own["lr"])
            for row, grad in zip(rows.tolist(), grads.double() * factor, strict=True):
                self.steps[name][row] += 1
                t, w = self.steps[name][row], self.weights[name][row]
                m = self.m[name][row] = beta1 * self.m[name][row] + (1 - beta1) * grad
                v = self.v[name][row] = beta2 * self.v[name][row] + (1 - beta2) * grad**2
                w = w - lr * own["weight_decay"] * w
                self.weights[name][row] = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + own["eps"])
