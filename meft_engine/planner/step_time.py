"""Bytes that cross in a step, and how long a step takes, from counts and the machine's speeds."""

from __future__ import annotations

from dataclasses import dataclass

from meft_engine.planner.measure import Speeds
from meft_engine.planner.memory import trained_parameters
from meft_engine.planner.model_shape import ModelShape
from meft_engine.planner.network import Load, Tables
from meft_engine.planner.passes import Part, parts
from meft_engine.planner.rows import key_bytes, layers_with_slots, most_active_rows, touched_rows
from meft_engine.planner.settings import RunSettings
from meft_engine.planner.trace import BaseTrace

PASS_OVER_FLOOR = {"route": 2.6, "combine": 4.0, "row_gradients": 3.2, "update": 0.7, "backward": 1.0}
"""What passes take, over what their bytes and operations would take, in C++ on a CPU
(``benchmarks/results/step_profile.csv``). Updates stream faster than torch's copy."""
BASE_PASS_OVER_FLOOR = {"cpu": 2.2, "cuda": 1.0}
"""The same of the base's passes that are no products of matrices, over what SiLU would take for their bytes
(``benchmarks/results/plan.csv``); assumed on a GPU."""
CATCH_UP_OVER_FLOOR = 6.0
"""The same of values that are brought to date for each reader, in the mode "dense_equivalent"
(``benchmarks/results/plan.csv``): each has steps of its own to make up for, in powers of the betas."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    parts: dict[str, float]
    """``base_forward``, ``base_backward``, ``adapter``, ``catch_up``, ``update``, ``pcie``, ``network``."""
    hidden: float
    """Of these, what runs beside something longer."""

    @property
    def seconds(self) -> float:
        """Of all that is not hidden."""
        return sum(self.parts.values()) - self.hidden


def bus_bytes(run: RunSettings, model: ModelShape, share: float | None) -> dict[str, int]:
    """That cross between host and one device in a step.

    Rows are brought once in an accumulation window, as far as slots hold them, since every update changes what it has
    touched; rows that the device owns (``offload.resident_bytes``) are counted as if it did not.
    """
    block, widths = run.block, model.adapted(run.block.adapter)
    layers, width, size = len(widths), max(widths), run.compute_dtype.itemsize
    one = touched_rows(block, run.tokens, share=share)
    window = touched_rows(block, run.tokens, share=share, micro_batches=run.accumulation)
    kept = layers_with_slots(block, layers, width, run.tokens, compute_dtype=run.compute_dtype)
    # Slots hold as many rows as a micro-batch can activate.
    if block.optimizer.mode == "dense_equivalent":
        kept, size = 0, 4  # brought to date, and in fp32
    fresh = window if window <= most_active_rows(block, run.tokens) else run.accumulation * one
    visits = kept * fresh + (layers - kept) * 2 * run.accumulation * one
    tables = 1 if block.offload.keys == "device" else 2
    hidden = 0 if tables == 1 else 2 * run.accumulation * layers * run.tokens * width * 4
    updates = layers * window * key_bytes(block, width, run.compute_dtype) if tables == 1 else 0
    return {
        "values_to_device": int(tables * visits * width * size),
        "updates_to_device": int(updates + layers * window * 8),
        "gradients_to_host": int(run.accumulation * layers * 2 * one * width * 4),
        "hidden_states": hidden,
    }


def network_bytes(run: RunSettings, model: ModelShape, share: float | None) -> dict[str, int]:
    """That one rank sends to others in a step, and of those what leaves a node; see docs/ranks.md."""
    if run.ranks == 1:
        return {}
    block, widths = run.block, model.adapted(run.block.adapter)
    window = touched_rows(block, run.tokens, share=share, micro_batches=run.accumulation)
    union = touched_rows(block, run.tokens, share=share, micro_batches=run.accumulation * run.ranks)
    load = Load(
        Tables(max(widths), len(widths), block.adapter.rows),
        run.ranks,
        window,
        union,
        wire_bytes=2 if block.communication.dtype == "bf16" else 4,
        ranks_of_node=run.ranks_of_node,
        copy_bytes=run.compute_dtype.itemsize,
    )
    others = (run.ranks - 1) / run.ranks
    trained = trained_parameters(run, model)
    gathers = 2 * run.accumulation * model.parameters if run.stage == 3 else 0
    return {
        "row_gradients": int(load.gradient_bytes),
        "updated_rows": int(load.published_bytes),
        "facts": int(load.fact_bytes),
        "router_gradients": int(2 * others * trained * run.base_dtype.itemsize),
        "base_gathers": int(others * gathers * run.base_dtype.itemsize),
        "out_of_a_node": int(load.network_bytes),
    }


def step_time(
    run: RunSettings,
    model: ModelShape,
    trace: BaseTrace | None,
    speeds: Speeds,
    *,
    device: str,
    share: float | None,
    pcie: dict[str, int],
    network: dict[str, int],
) -> StepTime:
    """Of one step of all ranks together."""
    gas = run.accumulation
    if trace is not None:
        forward, backward, moved = trace.forward_flops, trace.backward_flops, trace.moved
    else:
        forward = backward = 2 * model.parameters * run.tokens
        moved = 0
    rate = (speeds.pass_gbps or speeds.device_gbps) * 1e9
    slow = BASE_PASS_OVER_FLOOR[device] * moved / rate
    third = slow / 3  # a backward reads and writes twice what its forward does
    found = {
        "base_forward": gas * (forward / speeds.flops_per_second + third),
        "base_backward": gas * (backward / speeds.flops_per_second + slow - third),
    }
    block, widths = run.block, model.adapted(run.block.adapter)
    shape = {
        "layers": len(widths),
        "tokens": run.tokens,
        "width": max(widths),
        "rows": block.adapter.rows,
        "experts": block.adapter.resolved_num_experts,
        "per_token": block.adapter.experts_per_token,
        "top_k": block.adapter.top_k,
        "size": run.compute_dtype.itemsize,
        "moment": 2 if block.optimizer.moments_dtype == "bf16" else 4,
    }

    def of(micro_batches: int) -> list[Part]:
        touched = touched_rows(block, run.tokens, share=share, micro_batches=micro_batches) / block.adapter.rows
        return parts(touched=touched, **shape)

    found["adapter"] = gas * sum(
        PASS_OVER_FLOOR[part.phase] * part.floor(speeds) for part in of(1) if part.phase != "update"
    )
    if block.optimizer.mode == "dense_equivalent":
        # Master and moments are read and the current value written, in the forward and in the backward.
        line = max(widths) * (8 + 2 * shape["moment"])
        brought = 2 * gas * len(widths) * touched_rows(block, run.tokens, share=share)
        found["catch_up"] = CATCH_UP_OVER_FLOOR * brought * line / (speeds.host_gbps * 1e9)
    update = next(part for part in of(gas) if part.phase == "update")
    host = update.moved / (speeds.host_gbps * 1e9)
    found["update"] = PASS_OVER_FLOOR["update"] * host / (run.nodes if block.optimizer.mode == "lazy" else 1)
    found["pcie"] = sum(pcie.values()) / (speeds.pcie_gbps * 1e9)
    abroad = network.get("out_of_a_node", 0) + run.ranks_of_node * network.get("base_gathers", 0) * (run.nodes > 1)
    found["network"] = abroad / (speeds.network_gbps * 1e9)
    computing = found["base_forward"] + found["base_backward"] + found["adapter"]
    # Rows travel beside the computation, and an update beside the next step's first forward.
    hidden = min(found["pcie"], computing)
    if block.optimizer.overlaps(device):
        hidden += min(found["update"], found["base_forward"] / gas)
    return StepTime(found, hidden)
