"""What a DeepSpeed configuration says of memory and time, with what its ``"auto"`` leaves to the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_engine.config import MeftConfig, MeftConfigError, find_block

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class RunSettings:
    """Of one run."""

    block: MeftConfig
    base_dtype: torch.dtype
    """That the base computes in."""
    compute_dtype: torch.dtype
    """Of the rows' compute copies."""
    micro_batch: int
    """Sequences of a rank in one forward and backward."""
    sequence_length: int
    accumulation: int
    stage: int
    offload_optimizer: bool
    offload_param: bool
    bucket_bytes: int
    """Of the buffer, or two, that ZeRO gathers gradients in on the device; 0 in stage 0."""
    most_live: int
    """Elements of the base that stage 3 may keep whole on the device."""
    keeps_inputs: bool
    """Whether linear layers keep their inputs although their weights are frozen: DeepSpeed's own of stage 3 do."""
    gradient_checkpointing: bool
    ranks_of_node: int
    nodes: int

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.ranks_of_node * self.nodes

    @property
    def tokens(self) -> int:
        """Of a micro-batch of one rank."""
        return self.micro_batch * self.sequence_length


def read_json(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration.

    Raises:
        MeftConfigError: if the file is not there, is no JSON, or holds no object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MeftConfigError(f"{path} cannot be read ({error.strerror}); name a DeepSpeed configuration") from None
    except ValueError as error:
        raise MeftConfigError(f"{path} is no JSON ({error}); name a DeepSpeed configuration") from None
    if not isinstance(found, dict):
        raise MeftConfigError(f"{path} holds no object; name a DeepSpeed configuration")
    return found


def read_settings(
    config: Mapping[str, Any],
    *,
    gpus: int = 1,
    nodes: int = 1,
    sequence_length: int = 512,
    batch_size: int | None = None,
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
) -> RunSettings:
    """Of a configuration, of which numbers count; what it leaves to the Trainer by ``"auto"`` is asked of the caller.

    Args:
        gpus: ranks of a node. batch_size: sequences of a micro-batch, where the configuration does not say.
        dtype: "bf16", "fp16" or "fp32", where the configuration does not say.

    Raises:
        MeftConfigError: for a bad block or none, and where a number is missing or is another one.
    """
    block = find_block(config)
    if block is None:
        raise MeftConfigError('the configuration has no enabled "meft" block, so there is nothing to plan; add one')
    for name, count in (("--gpus", gpus), ("--nodes", nodes), ("--sequence_length", sequence_length)):
        if count < 1:
            raise MeftConfigError(f"{name} = {count} is not possible; use 1 or more")
    accumulation, micro_batch = _batch(config, gpus * nodes, batch_size)
    base_dtype = _DTYPES[_precision(config, dtype)]
    rows_dtype = block.offload.compute_dtype
    zero = config.get("zero_optimization") or {}
    stage = _number(zero, "stage") or 0
    if stage not in (0, 1, 2, 3):
        raise MeftConfigError(f"zero_optimization.stage = {stage} is not known; use 0, 1, 2 or 3")
    # Without its own linear layers autograd holds on to every weight that was gathered.
    spares_weights = stage == 3 and zero.get("memory_efficient_linear", True) is not False
    most_live = int(_number(zero, "stage3_max_live_parameters") or 1e9) if spares_weights else sys.maxsize
    half = torch.bfloat16 if base_dtype != torch.float32 else torch.float32
    return RunSettings(
        block=block,
        base_dtype=base_dtype,
        compute_dtype=half if rows_dtype is None else _DTYPES[rows_dtype],
        micro_batch=micro_batch,
        sequence_length=sequence_length,
        accumulation=accumulation,
        stage=stage,
        offload_optimizer=_offloads(zero, "offload_optimizer") and stage > 0,
        offload_param=_offloads(zero, "offload_param") and stage == 3,
        bucket_bytes=_bucket_bytes(zero, stage, base_dtype),
        most_live=most_live,
        keeps_inputs=spares_weights,
        gradient_checkpointing=gradient_checkpointing,
        ranks_of_node=gpus,
        nodes=nodes,
    )


def _batch(config: Mapping[str, Any], ranks: int, batch_size: int | None) -> tuple[int, int]:
    """Accumulation steps, and sequences of a micro-batch."""
    micro = _number(config, "train_micro_batch_size_per_gpu")
    steps = _number(config, "gradient_accumulation_steps")
    whole = _number(config, "train_batch_size")
    if micro is None and whole is not None:
        micro = max(1, whole // (ranks * (steps or 1)))
    if micro is None and batch_size is None:
        given = config.get("train_micro_batch_size_per_gpu")
        said = f'= "{given}"' if given is not None else "is missing"
        raise MeftConfigError(
            f"train_micro_batch_size_per_gpu {said}, so the size of a micro-batch is not known; say it by --batch_size"
        )
    if micro is not None and batch_size not in (None, micro):
        raise MeftConfigError(
            f"--batch_size = {batch_size}, but the configuration says train_micro_batch_size_per_gpu = {micro}; leave "
            "one of them out"
        )
    micro = micro if micro is not None else batch_size
    if micro < 1:
        raise MeftConfigError(f"a micro-batch of {micro} sequences is not possible; use 1 or more")
    return steps or max(1, (whole or 0) // (ranks * micro)), micro


def _precision(config: Mapping[str, Any], asked: str | None) -> str:
    said = {}
    for name in ("bf16", "fp16"):
        said[name] = (config.get(name) or config.get({"bf16": "bfloat16"}.get(name, "")) or {}).get("enabled", False)
    named = next((name for name, enabled in said.items() if enabled is True), None)
    open_ = any(enabled == "auto" for enabled in said.values())
    if named is None and not open_:
        named = asked or "fp32"  # a script may load the base in any precision where DeepSpeed casts nothing
    if named is not None and asked not in (None, named):
        raise MeftConfigError(f"--dtype = {asked}, but the configuration says {named}.enabled = true; leave one out")
    return named or asked or "fp32"


def _number(section: Mapping[str, Any], name: str) -> int | None:
    value = section.get(name)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MeftConfigError(f'{name} = {value!r} is not a number; use one, or "auto"')
    return int(value)


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") in ("cpu", "nvme")


def _bucket_bytes(zero: Mapping[str, Any], stage: int, dtype: torch.dtype) -> int:
    """``setup_buckets`` in deepspeed/runtime/zero/stage_1_and_2.py, and what stage3.py allocates when it is built."""
    if stage == 0 or zero.get("contiguous_gradients", True) is False:
        return 0
    elements = _number(zero, "reduce_bucket_size") or 500_000_000
    twice = 2 if zero.get("overlap_comm") is True and stage < 3 else 1
    return twice * elements * (4 if stage == 1 else dtype.itemsize)
