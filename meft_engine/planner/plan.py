"""`plan_run`: what a run will take and whether it fits, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from meft_engine.config import MeftConfigError
from meft_engine.planner.limits import GIB, Limit, device_limit, host_limit
from meft_engine.planner.measure import Speeds
from meft_engine.planner.memory import device_bytes, disk_bytes, host_bytes, loading_bytes, trained_parameters
from meft_engine.planner.model_shape import ModelShape, imagined, read_config, shape_of
from meft_engine.planner.rows import touched_rows
from meft_engine.planner.settings import RunSettings, read_settings
from meft_engine.planner.step_time import StepTime, bus_bytes, network_bytes, step_time
from meft_engine.planner.trace import BaseTrace, trace_base


@dataclass(frozen=True)
class Plan:
    """What was worked out; bytes but where it says otherwise."""

    settings: RunSettings
    model: ModelShape
    trace: BaseTrace | None
    device_type: str
    """``"cuda"``, or ``"cpu"``, where device and host are one and ``device`` is empty."""
    host: dict[str, int]
    """Of a node while it trains, by kind; the node's peak is ``host_peak``."""
    host_loading: dict[str, int]
    """Of a node while the base is read."""
    device: dict[str, int]
    """Of each device, by kind."""
    disk: dict[str, int]
    """Of one checkpoint, by kind."""
    checkpoints: int | None
    """That stay; ``None``: all."""
    pcie: dict[str, int]
    """Across the bus of each device in a step."""
    network: dict[str, int]
    """That each rank sends in a step."""
    step: StepTime | None
    speeds: Speeds | None
    host_limit: Limit
    device_limit: Limit | None
    problems: tuple[str, ...] = ()
    """What does not fit, a sentence each."""
    assumptions: tuple[str, ...] = ()
    touched_share: float = 0.0
    """Of a layer's rows that a micro-batch touches."""
    nearest: tuple[str, ...] = field(default=())
    """Changes that make it fit, where it does not: all of them together."""

    @property
    def host_peak(self) -> int:
        """Of a node: while it trains, or while the base is read without what the system can take back."""
        loading = sum(count for kind, count in self.host_loading.items() if kind != "file")
        return max(sum(self.host.values()), loading)

    @property
    def host_of_rank(self) -> int:
        """Resident memory of one rank at most; what the ranks of a node share counts as an equal part."""
        return self.host_peak // self.settings.ranks_of_node

    @property
    def disk_per_checkpoint(self) -> int:
        """Of what ``save_checkpoint`` writes."""
        return sum(count for kind, count in self.disk.items() if kind != "adapter")

    @property
    def disk_in_all(self) -> int | None:
        """With the one that is being written before the oldest goes; ``None`` where all stay."""
        return None if self.checkpoints is None else (self.checkpoints + 1) * self.disk_per_checkpoint

    @property
    def fits(self) -> bool:
        """Whether host and device have room."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.settings
        widths = self.model.adapted(run.block.adapter)
        return {
            "fits": self.fits,
            "problems": list(self.problems),
            "nearest": list(self.nearest),
            "model": {
                "parameters": self.model.parameters,
                "layers": self.model.layers,
                "width": self.model.width,
                "adapted_ffns": len(widths),
            },
            "adapter_parameters": 2 * run.block.adapter.rows * sum(widths) + trained_parameters(run, self.model),
            "run": {
                "nodes": run.nodes,
                "ranks_of_node": run.ranks_of_node,
                "tokens_of_micro_batch": run.tokens,
                "gradient_accumulation_steps": run.accumulation,
                "zero_stage": run.stage,
                "base_dtype": str(run.base_dtype).removeprefix("torch."),
                "compute_dtype": str(run.compute_dtype).removeprefix("torch."),
                "gradient_checkpointing": run.gradient_checkpointing,
                "device": self.device_type,
            },
            "touched_share": self.touched_share,
            "host_bytes": self.host,
            "host_bytes_of_node": self.host_peak,
            "host_bytes_of_rank": self.host_of_rank,
            "host_bytes_while_loading": self.host_loading,
            "host_bytes_available": self.host_limit.bytes,
            "device_bytes_by_kind": self.device,
            "device_bytes": sum(self.device.values()),
            "device_bytes_available": self.device_limit.bytes if self.device_limit is not None else None,
            "disk_bytes": self.disk,
            "disk_bytes_per_checkpoint": self.disk_per_checkpoint,
            "disk_bytes_in_all": self.disk_in_all,
            "pcie_bytes_per_step": self.pcie,
            "network_bytes_per_step": self.network,
            "step_seconds": self.step.seconds if self.step is not None else None,
            "step_seconds_by_part": {**self.step.parts, "hidden": self.step.hidden} if self.step is not None else {},
            "speeds": asdict(self.speeds) if self.speeds is not None else {},
            "assumptions": list(self.assumptions),
        }


class Planner:
    """Plans runs of one model; what a forward and backward keeps is found out once for each size of micro-batch.

    Args:
        model: a folder or a name of the hub, whose ``config.json`` alone is read; a transformers configuration; or a
            shape, of which activations are known by a formula for the Llama family alone.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(self, model: ModelShape | str | Path | Any, *, trust_remote_code: bool = False) -> None:
        self._given, self._trust = model, trust_remote_code
        self._shapes: dict[str, ModelShape] = {}
        self._traces: dict[tuple, BaseTrace | None] = {}
        self.failed_trace: str | None = None
        """Why a model could not be run in imagination."""
        self._config = model
        if isinstance(model, (str, Path)):
            self._config = read_config(model, trust_remote_code=trust_remote_code)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """Of the weights in their file, where the configuration says."""
        dtype = getattr(self._config, "dtype", None) or getattr(self._config, "torch_dtype", None)
        return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype

    def shape(self, run: RunSettings) -> ModelShape:
        """Of the model, with the FFNs that the block names."""
        if isinstance(self._config, ModelShape):
            return self._config
        adapter = run.block.adapter
        key = f"{adapter.target_modules} {adapter.layers_to_transform}"
        if key not in self._shapes:
            with imagined(self._config, trust_remote_code=self._trust) as model:
                self._shapes[key] = shape_of(model, adapter)
        return self._shapes[key]

    def trace(self, run: RunSettings) -> BaseTrace | None:
        """What a micro-batch keeps and computes; ``None`` where the model cannot be run in imagination."""
        if isinstance(self._config, ModelShape):
            return None
        frozen = run.block.adapter.freeze_base
        key = (
            run.micro_batch,
            run.sequence_length,
            run.base_dtype,
            run.gradient_checkpointing,
            frozen,
            run.keeps_inputs,
        )
        if key not in self._traces:
            self._traces[key] = self._traced(run, run.base_dtype)
            if self._traces[key] is None and run.base_dtype == torch.float32:
                # Some operators of models with experts are described to PyTorch in 16 bits alone.
                half = self._traced(run, torch.bfloat16)
                self._traces[key] = half.twice_as_wide() if half is not None else None
        return self._traces[key]

    def _traced(self, run: RunSettings, dtype: torch.dtype) -> BaseTrace | None:
        try:
            with imagined(self._config, dtype=dtype, trust_remote_code=self._trust) as model:
                return trace_base(
                    model,
                    run.micro_batch,
                    run.sequence_length,
                    gradient_checkpointing=run.gradient_checkpointing,
                    frozen=run.block.adapter.freeze_base,
                    keeps_inputs=run.keeps_inputs,
                )
        except MeftConfigError:
            raise
        except Exception as error:  # models raise what they like where shapes depend on values
            self.failed_trace = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            return None

    def plan(
        self,
        run: RunSettings,
        *,
        device: str = "cpu",
        host: Limit | None = None,
        on_device: Limit | None = None,
        touched_share: float | None = None,
        speeds: Speeds | None = None,
        save_total_limit: int | None = None,
    ) -> Plan:
        """See :func:`plan_run`."""
        model, trace = self.shape(run), self.trace(run)
        if device == "cpu" and run.gradient_checkpointing and trace is not None:
            whole = self.trace(replace(run, gradient_checkpointing=False))
            trace = trace.with_gaps(whole) if whole is not None else trace
        host = host or host_limit()
        if device == "cuda" and on_device is None:
            on_device = device_limit("cuda")
        on_host = host_bytes(run, model, trace, device=device, share=touched_share, available=host.bytes)
        there = device_bytes(run, model, trace) if device == "cuda" else {}
        pcie = bus_bytes(run, model, touched_share) if device == "cuda" else {}
        network = network_bytes(run, model, touched_share)
        step = None
        if speeds is not None:
            step = step_time(run, model, trace, speeds, device=device, share=touched_share, pcie=pcie, network=network)
        share = touched_rows(run.block, run.tokens, share=touched_share) / run.block.adapter.rows
        keeps = [count for count in (run.block.checkpoint.keep_last, save_total_limit) if count is not None]
        found = Plan(
            settings=run,
            model=model,
            trace=trace,
            device_type=device,
            host=on_host,
            host_loading=loading_bytes(run, model, self.stored_dtype, device=device),
            device=there,
            disk=disk_bytes(run, model),
            checkpoints=min(keeps) if keeps else None,
            pcie=pcie,
            network=network,
            step=step,
            speeds=speeds,
            host_limit=host,
            device_limit=on_device if device == "cuda" else None,
            touched_share=share,
        )
        assumed = self._assumptions(found, given_share=touched_share is not None)
        return replace(found, problems=_problems(found), assumptions=assumed)

    def _assumptions(self, plan: Plan, *, given_share: bool) -> tuple[str, ...]:
        run, speeds = plan.settings, plan.speeds
        where = "given" if given_share else "estimated from text on SmolLM2-135M, give --touched_share if you know it"
        said = [f"a micro-batch touches {plan.touched_share:.0%} of a layer's rows ({where})"]
        if plan.trace is None:
            why = f" ({self.failed_trace})" if self.failed_trace else ""
            said.append(f"activations by a formula of the Llama family, since the model could not be run{why}")
        if plan.device_type == "cuda":
            said.append("an attention kernel that forms no matrix of scores; a CUDA context of 0.6 GiB")
        said.append(
            f"the script loads the base in {str(run.base_dtype).removeprefix('torch.')} and trains nothing else"
        )
        if speeds is not None:
            named = {"tflops": "TFLOP/s", "host_gbps": "GB/s in host memory"}
            if speeds.pass_gbps is not None:
                named["pass_gbps"] = "GB/s in an activation function"
            if plan.device_type == "cuda":
                named |= {"device_gbps": "GB/s on the device", "pcie_gbps": "GB/s across the bus"}
            if run.nodes > 1:
                named["network_gbps"] = "GB/s out of a node"
            said += [
                f"{getattr(speeds, name):.3g} {unit} ({speeds.sources.get(name, 'given')})"
                for name, unit in named.items()
            ]
            said.append("passes of the adapter take as long over their floor as in benchmarks/results/step_profile.csv")
        return tuple(said)


def plan_run(
    config: Mapping[str, Any],
    model: ModelShape | str | Path | Any,
    *,
    gpus: int = 1,
    nodes: int = 1,
    sequence_length: int = 512,
    batch_size: int | None = None,
    dtype: str | None = None,
    gradient_checkpointing: bool = False,
    device: str | None = None,
    host_memory: int | None = None,
    device_memory: int | None = None,
    touched_share: float | None = None,
    speeds: Speeds | None = None,
    save_total_limit: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What a run takes, from its configuration and the model's alone.

    Args:
        config: the whole DeepSpeed configuration. model: as :class:`Planner` has it.
        gpus: ranks of a node. nodes: how many.
        sequence_length: tokens of a sequence, padding included. batch_size: sequences of a micro-batch, where the
            configuration says "auto". dtype: "bf16", "fp16" or "fp32" of the base, where the configuration says "auto"
            or nothing.
        device: "cuda" or "cpu"; ``None``: "cuda" where there is one or ``device_memory`` is given.
        host_memory, device_memory: bytes of a node and of a device; ``None``: what this machine has available.
        touched_share: of a layer's rows that a micro-batch touches; ``None``: estimated.
        speeds: of the machine; ``None``: no time is predicted.
        save_total_limit: the Trainer's.

    Raises:
        MeftConfigError: for a bad configuration, a model that is not there, or a size that is not known. What does not
            fit is no error but stands in ``problems``.
    """
    run = read_settings(
        config,
        gpus=gpus,
        nodes=nodes,
        sequence_length=sequence_length,
        batch_size=batch_size,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    return Planner(model, trust_remote_code=trust_remote_code).plan(
        run,
        device=choose_device(device, device_memory),
        host=_given(host_memory),
        on_device=_given(device_memory),
        touched_share=touched_share,
        speeds=speeds,
        save_total_limit=save_total_limit,
    )


def choose_device(device: str | None, device_memory: int | None) -> str:
    """Where the model is going to compute.

    Raises:
        MeftConfigError: for another name.
    """
    if device not in (None, "cuda", "cpu"):
        raise MeftConfigError(f'--device = {device} is not known; use "cuda" or "cpu"')
    return device or ("cuda" if device_memory is not None or torch.cuda.is_available() else "cpu")


def _given(memory: int | None) -> Limit | None:
    return None if memory is None else Limit(memory, "as given")


def _problems(plan: Plan) -> tuple[str, ...]:
    run, found = plan.settings, []
    if plan.host_peak > plan.host_limit.bytes:
        kinds = plan.host if sum(plan.host.values()) == plan.host_peak else plan.host_loading
        found.append(
            f"host memory: {_gib(plan.host_peak)} GiB are needed on each node ({_largest(kinds)}), and "
            f"{plan.host_limit}"
        )
    if plan.device_limit is not None and sum(plan.device.values()) > plan.device_limit.bytes:
        found.append(
            f"device memory: {_gib(sum(plan.device.values()))} GiB are needed on each device "
            f"({_largest(plan.device)}), and {plan.device_limit}"
        )
    if run.ranks > 1 and run.block.optimizer.max_staleness:
        found.append(f"optimizer.max_staleness = 1 is refused with {run.ranks} ranks; use 0")
    if run.ranks > 1 and run.block.offload.resident_bytes:
        found.append(f"offload.resident_bytes is not supported with {run.ranks} ranks; use 0")
    return tuple(found)


def _largest(kinds: Mapping[str, int]) -> str:
    """The three largest kinds, in words."""
    first = sorted(kinds.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{kind.replace('_', ' ')} {_gib(count)}" for kind, count in first if count)


def _gib(count: int) -> str:
    # Rounded up, so that what is refused never reads as what is there.
    return f"{math.ceil(10 * count / GIB) / 10:.1f}"
