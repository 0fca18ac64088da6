"""A model with one way to train it, in a process of its own that takes steps when it is asked to."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LORA_RANK = 16


@dataclass(frozen=True)
class Contestant:
    """What is trained, and on how much.

    ``method``: ``base`` (frozen: forward, and backward to the inputs), ``meft``, ``lora``, or ``dense`` (all rows of a
    parallel adapter, under ZeRO stage 2 with ``offload_optimizer``). ``layers``: so many topmost ones have an adapter;
    0: all. ``experts``, ``top_k``: 0 as by default. ``cap``: of active rows; 0: none.
    """

    method: str
    rows: int = 0
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    cap: int = 0
    sequences: int = 8
    length: int = 64

    @property
    def name(self) -> str:
        """For people."""
        if self.method in ("base", "lora"):
            return self.method
        parts = [f"{self.method} r={self.rows}"]
        parts += [f"K={self.top_k}"] if self.top_k else []
        parts += [f"{self.experts} experts"] if self.experts else []
        parts += [f"cap {self.cap}"] if self.cap else []
        parts += [f"{self.layers} layers"] if self.layers else []
        return ", ".join(parts)


def precision() -> torch.dtype:
    """Of all contestants: bf16 where this machine computes in it at speed, else fp32."""
    from inference import native_bf16

    return torch.bfloat16 if native_bf16() else torch.float32


def serve(contestant: Contestant, model_folder: str, text: Tensor, threads: int, port: int, pipe: Connection) -> None:
    """Build it and answer: ``("steps", n)`` with the seconds of one, ``("figures",)`` with memory and phases, until
    ``None`` comes.

    Args:
        text: [n] int64, token ids that batches are cut from.
    """
    alone = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ.update(alone, MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trained = _Trained(contestant, model_folder, text)
    while (asked := pipe.recv()) is not None:
        pipe.send(trained.steps(asked[1]) if asked[0] == "steps" else trained.figures())
    trained.close()


class _Trained:
    def __init__(self, contestant: Contestant, model_folder: str, text: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=precision())
        model.train().requires_grad_(False)
        self._base_bytes = _alive_bytes()
        self._contestant, self._text, self._number = contestant, text, 0
        self._engine: Any = None
        self._model = model
        if contestant.method != "base":
            self._engine = _engine(contestant, model)
        self._phases: dict[str, float] = {}

    def steps(self, count: int) -> float:
        """Seconds of one step, on average; what a step leaves to be done later is done."""
        before = self._clock()
        began = time.perf_counter()
        for _ in range(count):
            self._step()
        if self._contestant.method == "meft":
            self._engine.synchronize_rows()
        seconds = (time.perf_counter() - began) / count
        after = self._clock()
        self._phases = {name: (total - before.get(name, 0.0)) / count for name, total in after.items()}
        return seconds

    def figures(self) -> dict[str, Any]:
        """Bytes of adapter, optimizer and gradients beside the base, resident memory, phases of the last steps."""
        report = self._engine.meft_report() if self._contestant.method == "meft" else {}
        gc.collect()
        return {
            "counted_bytes": _alive_bytes(self._model) - self._base_bytes,
            "resident_bytes": psutil.Process().memory_full_info().uss,
            "device_bytes": report.get("device_bytes", 0),
            "touched_share": report.get("touched_share") or 0.0,
            "phases": self._phases,
            "shape": self._shape() if report else {},
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()

    def _shape(self) -> dict[str, int]:
        adapters = self._engine.meft_adapters.adapters
        block, keys = self._engine.meft_config.adapter, next(iter(adapters.values())).keys
        return {
            "layers": len(adapters),
            "width": keys.width,
            "rows": keys.rows,
            "experts": block.resolved_num_experts,
            "per_token": block.experts_per_token,
            "top_k": block.top_k,
            "size": keys.compute_dtype.itemsize,
        }

    def _step(self) -> None:
        c = self._contestant
        starts = torch.randint(len(self._text) - c.length, (c.sequences,), generator=_numbered(self._number))
        ids = torch.stack([self._text[start : start + c.length] for start in starts.tolist()])
        self._number += 1
        if self._engine is None:
            inputs = self._model.get_input_embeddings()(ids).requires_grad_()
            self._model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
            return
        self._engine.backward(self._engine(input_ids=ids, labels=ids, use_cache=False).loss)
        self._engine.step()

    def _clock(self) -> dict[str, float]:
        return self._engine.phases.seconds() if self._contestant.method == "meft" else {}


def _numbered(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _engine(contestant: Contestant, model: nn.Module) -> Any:
    import meft_engine

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": contestant.sequences,
        "bf16": {"enabled": precision() == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    if contestant.method == "dense":
        config["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        config["optimizer"]["params"]["torch_adam"] = False  # DeepSpeedCPUAdam
        network = add_dense(model, contestant.rows)
    else:
        network = add_lora(model) if contestant.method == "lora" else _add_meft(contestant, model, config)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return meft_engine.initialize(model=network, config=config, model_parameters=trained or None)[0]


def _add_meft(contestant: Contestant, model: nn.Module, config: dict[str, Any]) -> nn.Module:
    adapter: dict[str, Any] = {"rows": contestant.rows}
    if contestant.top_k:
        adapter["top_k"] = contestant.top_k
    if contestant.experts:
        adapter["num_experts"] = contestant.experts
    if contestant.layers:
        count = len(model.model.layers)
        adapter["layers_to_transform"] = list(range(count - contestant.layers, count))
    config["meft"] = {"adapter": adapter, "active_rows": {"cap": contestant.cap or None}}
    return model


def add_lora(model: nn.Module) -> nn.Module:
    """The model with PEFT's LoRA on all its linear layers, in the model's precision."""
    import peft
    from learning.methods import LORA_MODULES

    dtype = model.dtype
    settings = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(LORA_MODULES))
    network = peft.get_peft_model(model, settings)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def add_dense(model: nn.Module, rows: int) -> nn.Module:
    """The model with a dense adapter of so many rows beside each FFN, where the FFN is and in its precision."""
    for layer in model.model.layers:
        layer.mlp.dense_adapter = _DenseAdapter(rows, layer.mlp.gate_proj.weight)
        layer.mlp.register_forward_hook(lambda mlp, inputs, output: output + mlp.dense_adapter(inputs[0]))
    return model


class _DenseAdapter(nn.Module):
    """A parallel adapter that computes with all rows; ``like``: the FFN's weight [f, d]."""

    def __init__(self, rows: int, like: Tensor) -> None:
        super().__init__()
        place = {"dtype": like.dtype, "device": like.device}
        width = like.shape[1]
        self.keys = nn.Parameter(torch.randn(rows, width, **place) / width**0.5)
        self.values = nn.Parameter(torch.zeros(rows, width, **place))

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h @ self.keys.T) @ self.values


def _alive_bytes(model: nn.Module | None = None) -> int:
    """Bytes of all tensors of this process, counting what several share once."""
    gradients = [parameter.grad for parameter in model.parameters()] if model is not None else []
    storages: dict[int, int] = {}
    for found in [*gc.get_objects(), *gradients]:
        if issubclass(type(found), Tensor) and found.layout is torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
    return sum(storages.values())
