"""The ``"meft"`` block of a DeepSpeed JSON: its fields, their meaning and their limits.

The block is validated before anything is allocated. Every mistake raises :class:`MeftConfigError` with one sentence
that names the field, the value and what would be right. A field exists here only when the code behind it exists.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meft_engine.cores import rank_cores

BLOCK = "meft"


class MeftConfigError(ValueError):
    """The ``"meft"`` block, or what it is combined with, cannot work; the message says what would."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def derived_num_experts(rows: int, experts_per_token: int) -> int:
    """The divisor of ``rows`` nearest to √(n · rows / 2), the smaller of two equally near, and at least n if one is.

    Routing costs N + n · rows / N dot products a token, which is least at N = √(n · rows). The experts of this N are
    larger by √2, which costs 6 % more: larger ones have learned more where they were compared.
    """
    aim = math.sqrt(experts_per_token * rows / 2)
    divisors = [d for i in range(1, math.isqrt(rows) + 1) if rows % i == 0 for d in (i, rows // i)]
    enough = [d for d in divisors if d >= experts_per_token]
    return min(enough or divisors, key=lambda d: (abs(d - aim), d))


class AdapterConfig(_Section):
    """The shape of the sparse adapter that stands beside every adapted FFN."""

    rows: int = Field(8192, ge=1, lt=2**31)
    """Rows r of the adapter in each adapted layer; a row is one key and one value, each as wide as the model."""

    num_experts: int | None = Field(None, ge=1)
    """Experts N that the rows are split into; N divides ``rows``. ``null``: its divisor nearest to
    √(``experts_per_token`` · ``rows`` / 2), near which routing is cheapest."""

    experts_per_token: int = Field(8, ge=1)
    """Experts whose rows a token scores (the n best by the router). At most ``num_experts``."""

    top_k: int = Field(28, ge=1)
    """Rows that a token keeps at most (the K largest positive activations among its experts' rows)."""

    gate: Literal["softmax", "sigmoid", "none"] = "softmax"
    """What multiplies an expert's activations: softmax over the chosen experts times n (mean 1), sigmoid, or nothing.

    ``softmax`` needs ``experts_per_token`` of at least 2 (over one expert it is constant). With ``none``
    the router gets no gradient but that of its balance and z-loss: without these, routing stays as it was initialised.
    """

    target_modules: list[str] | None = None
    """Module-name patterns (regular expressions, matched against the end of the name) of the FFNs to adapt, or
    of other modules that hold a linear layer and give back the width that they take.

    ``null``: every FFN; where there are experts, the block of them.
    """

    layers_to_transform: list[int] | str | None = None
    """Layers to adapt: a list of indices, or an inclusive range such as ``"4-11"``. ``null``: all."""

    init_keys: Literal["ffn", "random"] = "ffn"
    """Where the keys start: from the FFN's own gate rows and twice as much noise (rows repeat where they run out), or
    from noise alone."""

    center_inputs: bool = True
    """Subtract the mean of the layer's inputs over the first training micro-batch before routing and scoring.

    That mean is most of any input, so that without this all tokens, whatever they are, choose much the same rows.
    """

    freeze_base: bool = True
    """Freeze the base model (all but PEFT's own parameters in a PEFT model). ``false``: leave it as it is."""

    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of every random draw of the initialisation; the same seed gives the same adapter on every rank."""

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.num_experts is not None and self.rows % self.num_experts:
            below = self.rows - self.rows % self.num_experts
            nearest = [n for n in (below, below + self.num_experts) if n > 0]
            raise ValueError(
                f"adapter.rows = {self.rows} is not divisible by adapter.num_experts = {self.num_experts}; "
                f"the nearest counts that are: {' and '.join(map(str, nearest))}"
            )
        experts = self.resolved_num_experts
        if self.experts_per_token > experts:
            derived = "" if self.num_experts is not None else f" (derived from adapter.rows = {self.rows})"
            raise ValueError(
                f"adapter.experts_per_token = {self.experts_per_token} exceeds the number of experts, "
                f"{experts}{derived}; use a value from 1 to {experts}"
            )
        if self.gate == "softmax" and self.experts_per_token == 1:
            raise ValueError(
                'adapter.gate = "softmax" over adapter.experts_per_token = 1 is constant, so the router would never '
                'learn; use "sigmoid" or "none", or experts_per_token of at least 2'
            )
        candidates = self.experts_per_token * (self.rows // experts)
        if self.top_k > candidates:
            raise ValueError(
                f"adapter.top_k = {self.top_k} exceeds the {candidates} rows that a token scores "
                f"({self.experts_per_token} experts of {self.rows // experts} rows); use a value from 1 to {candidates}"
            )
        self.layer_indices(None)
        for pattern in self.target_modules or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f'adapter.target_modules = "{pattern}" is not a regular expression ({error}); to match a name as '
                    "it stands, escape its special characters with a backslash"
                ) from None
        return self

    @property
    def resolved_num_experts(self) -> int:
        """The number of experts N, derived from ``rows`` where the block leaves it open."""
        return (
            self.num_experts if self.num_experts is not None else derived_num_experts(self.rows, self.experts_per_token)
        )

    def layer_indices(self, num_layers: int | None) -> Sequence[int] | None:
        """The layers to adapt, ascending, or ``None`` for all.

        Args:
            num_layers: how many layers the model has, to check the indices against; ``None`` checks the form alone.

        Raises:
            MeftConfigError: for a malformed range, an empty list or an index that the model does not have.
        """
        asked = self.layers_to_transform
        if asked is None:
            return None
        if isinstance(asked, str):
            first, dash, last = asked.partition("-")
            if not (dash and first.strip().isdecimal() and last.strip().isdecimal() and int(first) <= int(last)):
                raise MeftConfigError(
                    f'adapter.layers_to_transform = "{asked}" is not a range; write it as "first-last", such as '
                    '"4-11", or as a list of indices'
                )
            # Never listed: a digit too many must not fill the memory.
            indices: Sequence[int] = range(int(first), int(last) + 1)
        else:
            indices = sorted(set(asked))
        if not indices:
            raise MeftConfigError("adapter.layers_to_transform = [] adapts nothing; name a layer, or null for all")
        if num_layers is not None:
            outside = next((i for i in (indices[0], indices[-1]) if not 0 <= i < num_layers), None)
            if outside is not None:
                raise MeftConfigError(
                    f"adapter.layers_to_transform names layer {outside}, but the model's layers are 0 to "
                    f"{num_layers - 1}"
                )
        return indices


class RouterConfig(_Section):
    """How routers learn, and how their experts are kept in use."""

    lr_scale: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """The routers' learning rate as a multiple of that of their optimizer group."""

    balance: Literal["none", "loss", "bias"] = "loss"
    """``loss``: an auxiliary loss of ``balance_coef`` times N Σ f P (Switch Transformers), which is 1 at even load.
    ``bias``: no loss; after each step an expert's logit gains or loses ``balance_coef`` in the choice of experts alone.
    """

    balance_coef: float = Field(0.01, gt=0.0, allow_inf_nan=False)
    """Weight of the auxiliary loss, in each layer; or the step of the bias, in units of the router's logits."""

    z_loss_coef: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Weight of the mean squared logsumexp of the router's logits, in each layer, which keeps them small."""

    @property
    def adds_losses(self) -> bool:
        """Whether the router's logits have losses of their own."""
        return self.balance == "loss" or self.z_loss_coef > 0


class ActiveRowsConfig(_Section):
    """How many rows one micro-batch may bring to the device in one layer."""

    cap: int | None = Field(None, ge=1)
    """Most rows that may be active in a layer for one micro-batch. ``null``: all rows (the cap never binds)."""

    on_overflow: Literal["keep_largest", "raise"] = "keep_largest"
    """Above the cap: keep the rows of largest total activation, or raise :class:`ActiveRowsOverflow`."""


class OffloadConfig(_Section):
    """Where rows live and in which precision they are read."""

    keys: Literal["device", "host"] = "device"
    """Where keys are scored. ``host``: hidden states of each layer go to the host, and choices come back, for adapters
    of which a device cannot hold even the keys."""

    keys_dtype: Literal["bf16", "int8"] = "bf16"
    """Precision of the keys on the device, and so of what the model computes with: ``int8`` takes half the memory, with
    a scale for each row, of what ``compute_dtype`` has. ``bf16``: as ``compute_dtype`` says."""

    compute_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the copy of the rows that the model computes with. ``null``: bf16 under bf16 or fp16, else fp32."""

    pin_memory: bool = True
    """Pin the rows' host memory, so that a GPU reads it in place, beside its computation. Without a GPU there is
    nothing to pin it for."""

    slot_bytes: int | None = Field(None, ge=0)
    """Device memory in which value rows stay from a forward to its backward and over an accumulation window, of all
    layers. ``null``: as much as they take. Layers for which too little is left bring their rows for each pass."""

    grad_slot_bytes: int | None = Field(None, ge=0)
    """Device memory in which row gradients, in fp32, are added up over an accumulation window, of all layers. What
    comes once it is full is added up on the host. ``null``: everything is."""

    resident_bytes: int = Field(0, ge=0)
    """Device memory for rows that the device owns, of all layers: their masters, moments and gradients live there and
    are updated there. They are the rows in most use, chosen anew as training goes on. Without a GPU it means nothing.
    """

    huge_pages: bool = True
    """Ask the system for pages of 2 MiB for rows and moments (Linux: transparent huge pages, ``madvise``)."""

    @model_validator(mode="after")
    def _check(self) -> OffloadConfig:
        if self.keys == "host" and self.keys_dtype == "int8":
            raise ValueError(
                'offload.keys_dtype = "int8" is for keys on the device; with offload.keys = "host" leave it out'
            )
        if self.keys == "host" and self.resident_bytes:
            raise ValueError(
                f'offload.resident_bytes = {self.resident_bytes} needs offload.keys = "device": a device that cannot '
                "hold the keys has no room for rows of its own"
            )
        return self


class OptimizerConfig(_Section):
    """How touched rows are updated. Betas, eps, weight decay and the lr schedule follow the user's optimizer."""

    lr_scale: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """The rows' learning rate as a multiple of that of the optimizer group that holds the layer's router."""

    value_lr_scale: float = Field(4.0, gt=0.0, allow_inf_nan=False)
    """The values' learning rate as a multiple of the keys' (as LoRA+ has it, https://arxiv.org/abs/2402.12354).

    Keys decide which rows a token takes, so that they must move slowly; values start at zero and have a way to go.
    """

    mode: Literal["lazy", "dense_equivalent"] = "lazy"
    """``lazy``: a row ages only when it is touched. ``dense_equivalent``: idle rows move as dense AdamW moves them."""

    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the moments: 8 bytes a parameter in fp32; 4 in bf16, which is rounded stochastically."""

    overlap: bool | None = None
    """Update rows on a thread of their own while the next forward runs. The results are the same, bit for bit.

    ``None``: where the model computes on an accelerator; on a CPU both would only take the cores from one another.
    """

    max_staleness: int = Field(0, ge=0, le=1)
    """1: let a training forward read rows that still miss the last update (then results depend on timing)."""

    num_threads: int | None = Field(None, ge=1)
    """Threads of an update. ``null``: one for each core of the process."""

    worker_timeout: float = Field(10.0, gt=0.0, allow_inf_nan=False)
    """Seconds without a sign of life from the updating thread after which training stops with an error."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.max_staleness and self.overlap is False:
            raise ValueError(
                "optimizer.max_staleness = 1 needs optimizer.overlap = true: without it no row is ever stale"
            )
        return self

    def overlaps(self, device: str) -> bool:
        """Whether rows are updated on a thread of their own where the model computes on ``device``."""
        if self.overlap is not None:
            return self.overlap
        return bool(self.max_staleness) or not device.startswith("cpu")


class CommunicationConfig(_Section):
    """How several ranks train one adapter."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of row gradients on their way to the ranks that own the rows; sums are in fp32."""

    timeout: float = Field(300.0, ge=1.0, allow_inf_nan=False)
    """Seconds after which a rank that is silent, or that the others wait for, counts as lost and ends the run."""


class CheckpointConfig(_Section):
    """What ``save_checkpoint`` writes."""

    async_save: bool = False
    """Train on while a checkpoint's rows are written: they are what they were when the save began."""

    snapshot_bytes: int | None = Field(None, ge=1)
    """Memory of a rank for copies of rows that change while they wait to be written; used up, the update waits.
    ``null``: a quarter of the memory that is free when training starts, divided among the ranks of the node."""

    save_base: bool = False
    """Also write the frozen base model into every checkpoint. Off: a resume starts from the same base model."""

    keep_last: int | None = Field(None, ge=1)
    """How many checkpoints stay in a folder; older ones are removed once a new one is whole. ``null``: all."""


class MonitorConfig(_Section):
    """What is watched during a run."""

    interval: int = Field(10, ge=1)
    """Optimizer steps between two readings, which go to DeepSpeed's monitors and to the run's log."""

    folder: str | None = Field(None, min_length=1)
    """Where the run's log is kept. ``null``: in the ``output_dir`` of a ``Trainer``; without a ``Trainer``, nowhere."""

    min_kept_mass: float = Field(0.9, ge=0.0, le=1.0)
    """Warn, once, when the cap keeps less than this share of the activation."""

    max_dead_experts: float = Field(0.5, ge=0.0, le=1.0)
    """Warn, once, when more than this share of the experts is chosen by no token of an interval."""


class MeftConfig(_Section):
    """The whole ``"meft"`` block."""

    enabled: bool = True
    """``false``: plain DeepSpeed, bit for bit."""

    adapter: AdapterConfig = AdapterConfig()
    router: RouterConfig = RouterConfig()
    active_rows: ActiveRowsConfig = ActiveRowsConfig()
    offload: OffloadConfig = OffloadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    communication: CommunicationConfig = CommunicationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _check(self) -> MeftConfig:
        cap, adapter = self.active_rows.cap, self.adapter
        if self.offload.resident_bytes and self.optimizer.mode != "lazy":
            raise ValueError(
                f"offload.resident_bytes = {self.offload.resident_bytes} is not supported with optimizer.mode = "
                f'"{self.optimizer.mode}", which brings idle rows to date on the host; use "lazy", or 0 bytes'
            )
        if self.offload.resident_bytes and self.optimizer.max_staleness:
            raise ValueError(
                f"offload.resident_bytes = {self.offload.resident_bytes} is not supported with "
                f"optimizer.max_staleness = {self.optimizer.max_staleness}: the device's own rows are never old; use 0 "
                "of either"
            )
        if cap is not None and cap < adapter.top_k:
            raise ValueError(
                f"active_rows.cap = {cap} is smaller than adapter.top_k = {adapter.top_k}: not even one token's rows "
                f"would fit; use a cap of at least {adapter.top_k}"
            )
        return self

    @classmethod
    def from_block(cls, block: Any) -> MeftConfig:
        """Validate the value under ``"meft"``.

        Raises:
            MeftConfigError: with one sentence that names the field, the value and the remedy.
        """
        if not isinstance(block, Mapping):
            raise MeftConfigError(f'"{BLOCK}" = {block!r} must be an object such as {{"enabled": true}}')
        try:
            return cls.model_validate(dict(block))
        except ValidationError as error:
            raise MeftConfigError(_one_sentence(error)) from None

    @property
    def trains_routers(self) -> bool:
        """Whether routers get a gradient at all."""
        return self.adapter.gate != "none" or self.router.adds_losses

    def resolved(self) -> dict[str, Any]:
        """The block as a plain dictionary with derived values filled in, as it is logged and saved."""
        values = self.model_dump()
        values["adapter"]["num_experts"] = self.adapter.resolved_num_experts
        if values["active_rows"]["cap"] is None:
            values["active_rows"]["cap"] = self.adapter.rows
        if values["offload"]["grad_slot_bytes"] is None:
            values["offload"]["grad_slot_bytes"] = 0
        if values["optimizer"]["num_threads"] is None:
            values["optimizer"]["num_threads"] = len(rank_cores())
        return values


def find_block(config: Mapping[str, Any]) -> MeftConfig | None:
    """The validated block of a DeepSpeed configuration, or ``None`` where it is absent or disabled.

    Args:
        config: the whole DeepSpeed configuration.

    Raises:
        MeftConfigError: for a bad block, or for one that stands under the wrong key and would be ignored.
    """
    if BLOCK not in config:
        for key, value in config.items():
            if _looks_like_block_name(key) and isinstance(value, Mapping):
                raise MeftConfigError(f'unknown top-level key "{key}"; the block\'s key is "{BLOCK}"')
            if isinstance(value, Mapping) and BLOCK in value:
                raise MeftConfigError(f'"{BLOCK}" stands inside "{key}"; move it to the top level of the configuration')
        return None
    block = MeftConfig.from_block(config[BLOCK])
    return block if block.enabled else None


def _looks_like_block_name(key: str) -> bool:
    name = key.strip().lower()
    return name == BLOCK or name.startswith(BLOCK) or bool(difflib.get_close_matches(name, [BLOCK], cutoff=0.7))


def _one_sentence(error: ValidationError) -> str:
    """Pydantic's first complaint in the words of a user of the JSON."""
    first = error.errors()[0]
    # Of a field with alternatives, pydantic names the alternative too, such as "list[int]".
    where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "extra_forbidden":
        section = MeftConfig
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        name, names = str(first["loc"][-1]), sorted(section.model_fields)
        guess = difflib.get_close_matches(name, names, n=1)
        remedy = f'did you mean "{guess[0]}"?' if guess else f"the fields there are {', '.join(names)}"
        return f'"{BLOCK}" has no field {where} (= {first["input"]!r}); {remedy}'
    if first["type"] == "value_error":
        return f'"{BLOCK}": {first["ctx"]["error"]}'
    if isinstance(first["input"], str) and first["input"] == "auto":
        return f'"{BLOCK}": {where} = "auto" is not supported inside the block; leave it out for its default'
    message = first["msg"].removeprefix("Input ").strip() if first["type"] != "model_type" else "should be an object"
    return f'"{BLOCK}": {where} = {first["input"]!r} is not valid: it {message}'
