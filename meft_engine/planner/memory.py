"""Bytes of a run by kind: on a node's host, on a device, on disk."""

from __future__ import annotations

from collections import Counter

import torch

from meft_engine.planner.base import base_bytes_needed, checkpointed_bytes
from meft_engine.planner.model_shape import ModelShape
from meft_engine.planner.rows import (
    BYTES_PER_TRAINED_PARAMETER,
    device_bytes_needed,
    host_rows_by_kind,
    most_active_rows,
    router_parameters,
    snapshot_bytes_needed,
    touched_rows,
)
from meft_engine.planner.settings import RunSettings
from meft_engine.planner.trace import BaseTrace

PROCESS_BYTES = {"cpu": 525 << 20, "cuda": 2 << 30}
"""Resident memory of a rank without a model: Python with torch, transformers, DeepSpeed and a tokenizer; measured on a
CPU, assumed where CUDA's libraries come on top."""
CONTEXT_BYTES = 600 << 20
"""Device memory of a CUDA context and the workspaces of cuBLAS; assumed."""

_PAGE = 1 << 21  # gradients lie in whole huge pages


def adapter_activations(run: RunSettings, model: ModelShape) -> int:
    """Bytes that adapters keep of a micro-batch for its backward: choices and scores of each token.

    Choices are kept twice, for the backward and for layers that run again.
    """
    block, tokens = run.block.adapter, run.tokens
    n, k, experts = block.experts_per_token, block.top_k, block.resolved_num_experts
    chosen = n * 8 + k * (8 + 8 + 1)
    of_token = n * 4 + k * 4 + (4 * experts if run.block.router.adds_losses else 0)
    of_layer = tokens * (2 * chosen + of_token) + 2 * 8 * most_active_rows(run.block, tokens)
    if run.gradient_checkpointing:
        of_layer = tokens * chosen + 8 * most_active_rows(run.block, tokens)
    return len(model.adapted(block)) * of_layer


def activations(run: RunSettings, model: ModelShape, trace: BaseTrace | None, *, device: str) -> int:
    """Bytes at the worst moment of a micro-batch's forward and backward, besides weights."""
    size = run.base_dtype.itemsize
    if trace is not None:
        base = trace.heap_peak if device == "cpu" else trace.peak
        # Adapters keep their inputs, which a base without them keeps only where its linear layers do.
        if not (run.gradient_checkpointing or run.keeps_inputs):
            base += run.tokens * sum(model.adapted(run.block.adapter)) * size
    elif run.gradient_checkpointing:
        base = checkpointed_bytes(model, run.tokens, keeps_inputs=run.keeps_inputs) * size // 2
    else:
        base = base_bytes_needed(model, run.tokens, keeps_inputs=run.keeps_inputs)["activations"] * size // 2
    return base + adapter_activations(run, model)


def host_bytes(
    run: RunSettings, model: ModelShape, trace: BaseTrace | None, *, device: str, share: float | None, available: int
) -> dict[str, int]:
    """Of a node while it trains, by kind.

    Args:
        device: where the model computes; on ``"cpu"`` the base and its activations are in host memory too.
        share: of a layer's rows that a micro-batch touches; ``None``: estimated. available: bytes that there are.
    """
    block, ranks = run.block, run.ranks_of_node
    widths = Counter(model.adapted(block.adapter))
    found: Counter[str] = Counter()
    for width, layers in widths.items():
        found.update(
            host_rows_by_kind(
                block,
                layers,
                width,
                compute_dtype=run.compute_dtype,
                ranks=run.ranks,
                ranks_of_node=ranks,
            )
        )
    rows = sum(found.values())
    found["gradients"] = ranks * sum(n * _gradients(run, width, share) for width, n in widths.items())
    trained = trained_parameters(run, model)
    if device == "cpu" or run.offload_optimizer:
        # Weights and gradients stay where the model computes, at 4 bytes for the two in 16 bits.
        each = BYTES_PER_TRAINED_PARAMETER if device == "cpu" and not run.offload_optimizer else 16
        found["deepspeed_optimizer"] = trained * each * ranks // (run.ranks if run.stage else 1)
    weights = model.parameters * run.base_dtype.itemsize
    if device == "cpu":
        found["base"] = ranks * (weights // run.ranks if run.stage == 3 else weights)
        found["gathered"] = ranks * _gathered(run, model, device)
        found["activations"] = ranks * activations(run, model, trace, device=device)
    else:
        found["base"] = ranks * (weights // run.ranks) if run.offload_param else 0
        found["staging"] = ranks * _staging(run, max(widths, default=model.width))
    found["process"] = ranks * PROCESS_BYTES[device]
    if block.checkpoint.async_save:
        given = snapshot_bytes_needed(block, rows, ranks)
        found["snapshot"] = given or min(rows, max(0, available - sum(found.values())) // 4)
    return dict(found)


def trained_parameters(run: RunSettings, model: ModelShape) -> int:
    """Elements that DeepSpeed's optimizer trains: the routers, and the base where it is not frozen."""
    widths = Counter(model.adapted(run.block.adapter))
    routers = sum(router_parameters(run.block, layers, width) for width, layers in widths.items())
    return routers + (0 if run.block.adapter.freeze_base else model.parameters)


def _gathered(run: RunSettings, model: ModelShape, device: str) -> int:
    """What stage 3 brings together of the base; one rank alone computes with its part, unless that lies elsewhere."""
    lies_elsewhere = run.offload_param and device != "cpu"
    if run.stage != 3 or (run.ranks == 1 and not lies_elsewhere):
        return 0
    return min(model.parameters, max(run.most_live, model.largest_module)) * run.base_dtype.itemsize


def _gradients(run: RunSettings, width: int, share: float | None) -> int:
    """Of keys and values of a layer on the host: what a micro-batch has left; where there are more, what the next one
    leaves besides, and the sum. Memory of the former is kept for the next step."""

    block = run.block

    def pages(rows: float) -> int:
        # Layers differ, so that half of them take a page more than the mean does; what is bounded does not.
        bounded = rows >= min(block.adapter.rows, block.active_rows.cap or block.adapter.rows)
        size = int(rows * width * 4)
        return -(-size // _PAGE) * _PAGE if bounded else size + _PAGE

    one = touched_rows(block, run.tokens, share=share)
    if run.accumulation == 1:
        return 2 * pages(one)
    whole = touched_rows(block, run.tokens, share=share, micro_batches=run.accumulation)
    room = 2 * one  # it grows by doubling, and comes to lie in other places of the heap
    while room < whole:
        room *= 2
    return 2 * (2 * pages(one) + int(min(room, block.adapter.rows) * width * 4) + block.adapter.rows * 8)


def _staging(run: RunSettings, width: int) -> int:
    """Two pinned buffers each for rows that are brought and for updates that are sent, of the most active rows; and
    the gradients under way."""
    most = most_active_rows(run.block, run.tokens)
    return 4 * most * width * run.compute_dtype.itemsize + 4 * most * width * 4


def loading_bytes(run: RunSettings, model: ModelShape, stored: torch.dtype | None, *, device: str) -> dict[str, int]:
    """Host memory of a node at the worst moment of reading the base, by kind.

    Returns:
        ``file``: pages of the file, which all ranks of a node share and the system takes back when it needs them.
        ``weights``: each rank's own, in the precision of training: all of them before they go to the device, or none
        where the file has that precision, whose pages are then used as they are (on a CPU for good). Under stage 3
        ``zero.Init`` may spare the ranks that; it is not counted on. ``process``: of all ranks.

    Args:
        stored: precision of the file; ``None``: not known, taken as another one.
    """
    same = stored == run.base_dtype
    stored_bytes = (stored or run.base_dtype).itemsize
    own = 0 if same else model.parameters * run.base_dtype.itemsize
    return {
        "file": model.parameters * stored_bytes,
        "weights": run.ranks_of_node * own,
        "process": run.ranks_of_node * PROCESS_BYTES[device],
    }


def device_bytes(run: RunSettings, model: ModelShape, trace: BaseTrace | None) -> dict[str, int]:
    """Of one device while it trains, by kind; those of the adapter as ``meft_report()["device_bytes_by_kind"]``."""
    block = run.block
    widths = model.adapted(block.adapter)
    adapter = device_bytes_needed(block, len(widths), max(widths), run.tokens, compute_dtype=run.compute_dtype)
    size = run.base_dtype.itemsize
    weights = model.parameters * size
    found = {"base": weights}
    if block.optimizer.mode == "dense_equivalent":
        adapter["brought"] = most_active_rows(block, run.tokens) * max(widths) * 4  # one layer's values at a time
    if run.stage == 3:
        found = {"base": 0 if run.offload_param else weights // run.ranks, "gathered": _gathered(run, model, "cuda")}
    if run.offload_optimizer:
        adapter["routers"] = adapter["routers"] // BYTES_PER_TRAINED_PARAMETER * 2 * size
    if not block.adapter.freeze_base:
        state = 0 if run.offload_optimizer else 12 * model.parameters // (run.ranks if run.stage else 1)
        found["base_optimizer"] = state + size * model.parameters
    return {
        **found,
        **adapter,
        "activations": activations(run, model, trace, device="cuda"),
        "zero_buckets": run.bucket_bytes,
        "context": CONTEXT_BYTES,
    }


def disk_bytes(run: RunSettings, model: ModelShape) -> dict[str, int]:
    """Of one checkpoint, by kind: ``rows`` with their optimizer state, ``deepspeed``'s own files, and ``base`` where it
    is saved. ``adapter``: what ``save_model`` and each ``checkpoint-*`` of the Trainer hold besides."""
    widths, block = Counter(model.adapted(run.block.adapter)), run.block
    rows = copies = 0
    for width, layers in widths.items():
        kinds = host_rows_by_kind(block, layers, width, compute_dtype=run.compute_dtype)
        rows, copies = rows + sum(kinds.values()), copies + kinds["compute_copies"]
    trained = trained_parameters(run, model)
    size = run.base_dtype.itemsize
    return {
        "rows": rows,
        "deepspeed": trained * (size + 8 + (4 if size < 4 else 0 if run.stage == 0 else 4)),
        "base": model.parameters * size if block.checkpoint.save_base else 0,
        "adapter": copies + trained * size,
    }
