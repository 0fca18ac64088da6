"""What MEFT can run with; the rest is refused in one sentence each before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from meft_engine.adapter.attach import DTYPES
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.param_groups import require_adam, require_adam_name


def compute_dtype_of(block: MeftConfig, config_class: Any) -> torch.dtype:
    """The precision of the rows' compute copies."""
    if block.offload.compute_dtype is not None:
        return DTYPES[block.offload.compute_dtype]
    half = config_class.bfloat16_config.enabled or config_class.float16_config.enabled
    return torch.bfloat16 if half else torch.float32


def base_to_come(model: nn.Module, device: str, config_class: Any) -> int:
    """Bytes of a model's weights that DeepSpeed will put onto a device and that are not there yet.

    None under ZeRO stage 3, which keeps a part of them there that depends on its own settings.
    """
    if config_class.zero_enabled and config_class.zero_optimization_stage == 3:
        return 0
    half = config_class.bfloat16_config.enabled or config_class.float16_config.enabled
    elsewhere = [p for p in model.parameters() if p.device.type != torch.device(device).type]
    return sum(p.numel() * (min(2, p.itemsize) if half else p.itemsize) for p in elsewhere)


def require_support(config_class: Any, optimizer: Any) -> None:
    """Refuse settings of DeepSpeed that rows cannot follow.

    Raises:
        MeftConfigError: naming the setting.
    """
    stage = config_class.zero_optimization_stage if config_class.zero_enabled else 0
    zero = config_class.zero_config
    # DeepSpeed before 0.19 has MiCS too.
    for option in ("zero_hpz_partition_size", "mics_shard_size"):
        value = getattr(zero, option, 0)
        if value > 1:
            raise MeftConfigError(
                f"zero_optimization.{option} = {value} is not supported with MEFT, which knows only parameters "
                "that are partitioned over all ranks; leave it out"
            )
    _require_plain_checkpoints(config_class)
    if config_class.float16_config.enabled and stage == 0:
        raise MeftConfigError(
            "fp16.enabled = true with ZeRO stage 0 is refused: DeepSpeed does not scale the loss there; use bf16, or "
            "zero_optimization.stage = 2"
        )
    if config_class.torch_autocast_enabled and config_class.torch_autocast_dtype == torch.float16:
        raise MeftConfigError(
            'torch_autocast.dtype = "float16" is refused: DeepSpeed scales the loss there by a scaler that the rows '
            'would not know of; use "bfloat16"'
        )
    if stage and not zero.compute_grad_norm:
        raise MeftConfigError(
            "zero_optimization.compute_grad_norm = false is not supported with MEFT, whose rows and parameters share "
            "one norm; leave it out"
        )
    if optimizer is None:
        require_adam_name(config_class.optimizer_name, config_class.optimizer_params)
    elif isinstance(optimizer, torch.optim.Optimizer):
        require_adam(optimizer)


def _require_plain_checkpoints(config_class: Any) -> None:
    """A checkpoint's files are listed with their sums once DeepSpeed has written its own."""
    settings = config_class.checkpoint_config
    writer = settings.get("writer")
    if writer is not None and writer.get("decoupled"):
        raise MeftConfigError(
            "checkpoint.writer.decoupled = true is not supported with MEFT, whose checkpoints are whole when they get "
            "their name; leave it out, and set meft.checkpoint.async_save = true to save in the background"
        )
    if config_class.datastates_config.enabled:
        raise MeftConfigError(
            "datastates_ckpt is not supported with MEFT, whose checkpoints are whole when they get their name; leave "
            "it out, and set meft.checkpoint.async_save = true to save in the background"
        )
    if config_class.use_node_local_storage:
        raise MeftConfigError(
            "checkpoint.use_node_local_storage = true is not supported with MEFT: all ranks write one checkpoint; "
            "leave it out and save to a folder that all nodes see"
        )


def require_support_of_ranks(block: MeftConfig, config: Mapping[str, Any]) -> None:
    """Refuse what several ranks cannot do with one adapter.

    Raises:
        MeftConfigError: naming the setting.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        return
    if block.optimizer.max_staleness:
        raise MeftConfigError(
            f"optimizer.max_staleness = {block.optimizer.max_staleness} with {ranks} ranks is refused: each would read "
            "rows of another age; use 0"
        )
    if block.offload.resident_bytes:
        raise MeftConfigError(
            f"offload.resident_bytes = {block.offload.resident_bytes} is not supported with {ranks} ranks, which share "
            "the rows of a node on its host; use 0"
        )
    tensor_parallel = config.get("tensor_parallel") or {}
    size = (tensor_parallel.get("autotp_size") or 1) if isinstance(tensor_parallel, Mapping) else 1
    if size > 1:
        raise MeftConfigError(
            f"tensor_parallel.autotp_size = {size} is not supported with MEFT, whose rows are as wide as the model; "
            "leave it out and let ZeRO stage 3 partition the base"
        )
