"""The contestants: each puts its trainable parameters beside or into the same frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meft_engine
from learning.top_layers import TopLayers
from learning.trial import Trial
from meft_engine.adapter.initialize import NOISE, initial_keys, seed_of_layer

BYTES_PER_TRAINED_PARAMETER = 16
"""On the device, under Adam: in fp32 the parameter, its gradient and two moments; in bf16 the former are half as large,
and there is an fp32 master besides."""
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CLIP = 1.0


def build(trial: Trial, model: TopLayers, schedule: Callable[[Any], Any]) -> deepspeed.DeepSpeedEngine:
    """The engine that trains ``model`` by the trial's method.

    Args:
        schedule: gives the learning rate's schedule for an optimizer.
    """
    settings = {"torch_adam": True, "lr": trial.learning_rate, "weight_decay": trial.weight_decay}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": trial.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": _CLIP,
        "optimizer": {"type": "AdamW", "params": settings},
        "steps_per_print": 10**9,
    }
    network: nn.Module = model
    if trial.method == "meft":
        config["meft"] = trial.block
    elif trial.method == "lora":
        network = peft.get_peft_model(model, lora_settings(trial.rank))
    elif trial.method == "dense":
        centered, noise = trial.variant.get("center_inputs", False), trial.variant.get("key_noise", NOISE)
        add_dense_adapters(model, trial.rows, trial.seed, centered=centered, noise=noise)
    else:
        raise ValueError(f"method = {trial.method!r} is none of meft, lora, dense")
    trained = None if trial.method == "meft" else _groups(network, trial)
    engine, *_ = meft_engine.initialize(model=network, model_parameters=trained, config=config, lr_scheduler=schedule)
    return engine


def _groups(network: nn.Module, trial: Trial) -> list[dict[str, Any]]:
    """What is trained, the values of dense adapters as much faster as the trial says."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    values = [parameter for name, parameter in trained.items() if name.endswith("dense_adapter.values")]
    others = [parameter for name, parameter in trained.items() if not name.endswith("dense_adapter.values")]
    faster = trial.learning_rate * trial.variant.get("value_lr_scale", 1.0)
    return [{"params": others}, *([{"params": values, "lr": faster}] if values else [])]


def lora_settings(rank: int) -> peft.LoraConfig:
    """LoRA on every linear layer, with the usual alpha of twice the rank."""
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_MODULES), lora_dropout=0.0)


def lora_rank_of_bytes(device_bytes: float, layers: nn.ModuleList) -> int:
    """The rank at which LoRA holds as many bytes on the device."""
    per_rank = sum(
        sum(module.weight.shape)
        for name, module in layers.named_modules()
        if name.rpartition(".")[2] in LORA_MODULES and isinstance(module, nn.Linear)
    )
    return max(1, round(device_bytes / (BYTES_PER_TRAINED_PARAMETER * per_rank)))


class DenseAdapter(nn.Module):
    """A parallel adapter that computes with all rows: ``ReLU(h Aᵀ) B``, values starting at zero.

    Args:
        centered: subtract the mean input of the first training batch, as MEFT does.
        noise: in the keys, as multiples of the FFN's rows.
    """

    def __init__(self, gate_weight: Tensor, rows: int, seed: int, centered: bool, noise: float) -> None:
        super().__init__()
        self._centered, self._center = centered, torch.zeros(gate_weight.shape[1])
        self.keys = nn.Parameter(initial_keys(gate_weight, rows, "ffn", seed, noise))
        self.values = nn.Parameter(torch.zeros_like(self.keys))

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        """What is added to the FFN's output: h [B, S, d] gives [B, S, d]; ``real`` [B, S] is false at padding."""
        if self._centered and self.training and not self._center.any():
            self._center = h.detach()[real].mean(0)
        return F.relu((h - self._center) @ self.keys.T) @ self.values


def add_dense_adapters(model: TopLayers, rows: int, seed: int, *, centered: bool = False, noise: float = NOISE) -> None:
    """Put a dense adapter beside every FFN."""
    for index, layer in enumerate(model.model.layers):
        seed_of_keys = seed_of_layer(seed, index)
        layer.mlp.dense_adapter = DenseAdapter(layer.mlp.gate_proj.weight, rows, seed_of_keys, centered, noise)
        layer.mlp.register_forward_hook(lambda mlp, args, output: output + mlp.dense_adapter(args[0], model.real))


def device_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """What training holds on the device besides the frozen model and activations."""
    if isinstance(engine, meft_engine.MeftEngine):
        return engine.meft_report()["device_bytes"]
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    return BYTES_PER_TRAINED_PARAMETER * trained
