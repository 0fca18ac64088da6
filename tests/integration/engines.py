"""Builds engines, runs steps, and reads what an engine holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

import meft_engine
from tests.families import VOCAB, tiny_block


def ds_config(
    meft: dict[str, Any] | None,
    *,
    stage: int = 0,
    bf16: bool = False,
    clip: float = 0.0,
    gas: int = 1,
    offload: bool = False,
    offload_param: bool = False,
    adam: dict[str, Any] | None = None,
    **top_level: Any,
) -> dict[str, Any]:
    """A DeepSpeed configuration.

    Args:
        meft: the block; ``None`` for none. clip: ``gradient_clipping``. gas: accumulation steps.
        offload, offload_param: ``offload_optimizer`` and ``offload_param`` to the CPU.
        adam: parameters of the JSON's AdamW; ``{}`` for no optimizer there.
    """
    # torch_adam: DeepSpeed's own CPU Adam would have to be compiled first.
    default = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        **top_level,
    }
    if adam is None or adam:
        config.setdefault("optimizer", {"type": "AdamW", "params": {**default, **(adam or {})}})
    if stage or offload:
        config["zero_optimization"] = {
            "stage": stage,
            **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
            **({"offload_param": {"device": "cpu"}} if offload_param else {}),
            # Of tiny models, stage 3 would partition nothing.
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
    if meft is not None:
        config["meft"] = meft
    return config


def build_engine(
    model: nn.Module,
    meft: dict[str, Any] | None = None,
    *,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    model_parameters: Any = None,
    **settings: Any,
) -> Any:
    """``meft_engine.initialize`` with :func:`ds_config` (whose settings it takes); the block is the tiny one."""
    if optimizer is not None:
        settings["adam"] = {}
    config = ds_config(tiny_block() if meft is None else meft, **settings)
    return meft_engine.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        model_parameters=model_parameters,
        config=config,
    )[0]


def batch(seed: int, size: int = 4, length: int = 12, vocab: int = VOCAB) -> Tensor:
    """[size, length] token ids."""
    return torch.randint(3, vocab, (size, length), generator=torch.Generator().manual_seed(seed))


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The language-modelling loss of a model or an engine, wherever it computes."""
    ids = ids.to(next(model.parameters()).device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_step(engine: Any, micro_batches: Sequence[Tensor]) -> float:
    """One optimizer step over some micro-batches; returns their mean loss."""
    losses = []
    for ids in micro_batches:
        loss = lm_loss(engine, ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def tables(engine: Any) -> dict[str, Any]:
    """The engine's tables by name, such as ``model.layers.0.mlp/keys``, every row of them up to date."""
    engine.synchronize_rows()
    return {table.name: table for table in engine.row_optimizer.tables()}


def masters(engine: Any) -> dict[str, Tensor]:
    """A copy of all master rows."""
    return {name: table.master.clone() for name, table in tables(engine).items()}


def routers(engine: Any) -> dict[str, nn.Parameter]:
    """The routers by the names of their FFNs."""
    return {name: adapter.router for name, adapter in engine.meft_adapters.adapters.items()}


def router_values(engine: Any) -> dict[str, Tensor]:
    """A copy of the routers, whole even where they are partitioned."""
    found = routers(engine)
    partitioned = [router for router in found.values() if hasattr(router, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        return {name: router.detach().cpu().clone() for name, router in found.items()}


def row_gradients(engine: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A copy of what each table has accumulated: its rows and their gradients."""
    pending = {name: table.gradient() for name, table in tables(engine).items()}
    return {name: (g.rows.clone(), g.grad.clone()) for name, g in pending.items() if g is not None}


def router_gradients(engine: Any) -> dict[str, Tensor]:
    """A copy of the gradients of the routers that are trained, as fp32."""
    trained = {name: router for name, router in routers(engine).items() if router.requires_grad}
    if engine.zero_optimization_stage():
        return {name: safe_get_full_grad(router).float().cpu().clone() for name, router in trained.items()}
    return {name: router.grad.float().cpu().clone() for name, router in trained.items()}


def router_state(engine: Any) -> dict[str, Tensor]:
    """Everything DeepSpeed holds of the routers: weights, and its optimizer's fp32 masters, moments and steps."""
    state = router_values(engine)
    optimizer = engine.basic_optimizer
    for group_id, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            state[f"{group_id}.{index}/fp32"] = parameter.detach().cpu().clone()
            for kind, value in optimizer.state.get(parameter, {}).items():
                state[f"{group_id}.{index}/{kind}"] = torch.as_tensor(value).cpu().clone()
    return state


def row_state(engine: Any) -> dict[str, Tensor]:
    """Everything held of the rows: masters, compute copies, moments, steps."""
    state = {}
    for name, table in tables(engine).items():
        state[name] = table.master.clone()
        state[f"{name}/compute"] = table.gather(torch.arange(table.rows)).cpu().clone()
        for kind, value in engine.row_optimizer.state[table.handle].items():
            state[f"{name}/{kind}"] = value.clone()
    return state


def full_state(engine: Any) -> dict[str, Tensor]:
    """Rows and routers together: what a step may change."""
    return {**row_state(engine), **{f"router {name}": value for name, value in router_state(engine).items()}}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal (or present on one side only)."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference between equally named tensors."""
    assert one.keys() == other.keys() and one
    return max(
        float((one[name].detach().cpu().double() - other[name].detach().cpu().double()).abs().max()) for name in one
    )


def refuse(engine: Any, folder: Path, kind: type[Exception], *words: str, **load: Any) -> None:
    """Loading raises ``kind`` in one sentence that holds the words, and changes neither engine nor random state."""
    before, generator, steps = full_state(engine), torch.get_rng_state(), engine.global_steps
    with pytest.raises(kind) as raised:
        engine.load_checkpoint(str(folder), **load)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert differing(before, full_state(engine)) == []
    assert torch.equal(torch.get_rng_state(), generator)
    assert engine.global_steps == steps
