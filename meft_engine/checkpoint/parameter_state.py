"""What DeepSpeed's optimizer holds of the parameters that train beside the rows, for an engine of any other layout.

DeepSpeed keeps masters and moments as its ZeRO stage lays them out over its ranks, and reads them only where the stage
and the number of ranks are the same. Here they are whole tensors with the names of parameters:

<parameter>/master       of its shape, float32: what the optimizer steps
<parameter>/exp_avg      of its shape, float32; with the next two only once the optimizer has stepped
<parameter>/exp_avg_sq   of its shape, float32
<parameter>/step         [], int64: how many steps it has taken
<parameter>/settings     [5], float64: lr, both betas, eps and weight decay of its group
loss_scaler              [4], float64: scale, step, step of the last overflow, hysteresis; of dynamic fp16 alone
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meft_engine.config import MeftConfigError
from meft_engine.zero_parameters import full_shape, is_partitioned

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOSS_SCALER = "loss_scaler"
_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_STATE_OF_ENGINE = (
    *("module", "optimizer", "lr_scheduler", "data_sampler", "random_ltd"),
    *("skipped_steps", "global_steps", "dp_world_size", "mp_world_size"),
)
"""What DeepSpeed itself takes from its model states; the rest is the client's."""


@dataclass(frozen=True)
class _Piece:
    """Where this rank's optimizer has its part of a parameter, which may be all or nothing of it."""

    held: Tensor
    """What the optimizer steps: the parameter, its master, or a flat tensor that holds several of them."""
    place: slice | EllipsisType
    """The part in it."""
    part: slice
    """The part of the flattened parameter that it is."""
    group: int
    """Index of the optimizer's parameter group."""


def supported(engine: MeftEngine) -> str | None:
    """Why the state of this engine's parameters cannot be captured or restored, in a few words; ``None``: it can."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    optimizer = engine.basic_optimizer
    if not engine.meft_config.adapter.freeze_base:
        return "the base model trains too (adapter.freeze_base = false)"
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, DeepSpeedCPUAdam, FusedAdam)):
        return f"the optimizer {type(optimizer).__name__} keeps its state in a way of its own"
    for option in ("offload_optimizer", "offload_param"):
        offload = getattr(engine._config.zero_config, option)
        if offload is not None and offload.device == "nvme":
            return f"{option} keeps its tensors on NVMe"
    if hasattr(engine.optimizer, "backup_optimizer"):
        return "offload_optimizer.ratio divides the parameters among two optimizers"
    return None


def capture(engine: MeftEngine) -> dict[str, Tensor]:
    """The state of all trained parameters, whole and on the CPU; all ranks have to call it.

    Beside the result, one tensor of one parameter is held at a time.

    Returns:
        The tensors that the module's docstring lists, in rank 0; an empty dictionary in the other ranks.
    """
    optimizer, leads = engine.basic_optimizer, engine.ranks.rank == 0
    tensors: dict[str, Tensor] = {}
    for name, (parameter, piece) in _trained(engine).items():
        state = optimizer.state.get(piece.held) or {}
        sources = {"master": piece.held, **{kind: state[kind] for kind in _MOMENTS if state}}
        for kind, source in sources.items():
            whole = _whole(engine, piece, source, full_shape(parameter))
            if leads:
                tensors[f"{name}/{kind}"] = whole
        if leads and state:
            tensors[f"{name}/step"] = torch.tensor(_steps_taken(optimizer, piece))
        if leads:
            group = optimizer.param_groups[piece.group]
            settings = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
            tensors[f"{name}/settings"] = torch.tensor([float(value) for value in settings], dtype=torch.float64)
    scaler = _dynamic_loss_scaler(engine)
    if leads and scaler is not None:
        fields = [float(getattr(scaler, field)) for field in _LOSS_SCALER_FIELDS]
        tensors[_LOSS_SCALER] = torch.tensor(fields, dtype=torch.float64)
    return tensors


def restore(engine: MeftEngine, tensors: Mapping[str, Tensor]) -> None:
    """Put what :func:`capture` returned into an engine, of whatever ZeRO stage, precision and number of ranks.

    Nothing is changed if it raises. Parameters that one flat tensor holds have one count of steps there: the largest.

    Args:
        tensors: all of them, in every rank; each is read when its turn comes.

    Raises:
        MeftConfigError: naming the first tensor that is missing, of another shape, or of no parameter that is trained.
    """
    optimizer, trained = engine.basic_optimizer, _trained(engine)
    _require(trained, tensors)
    _require_equal_settings(trained, tensors)

    steps: dict[int, int] = {}
    for name, (_, piece) in trained.items():
        if f"{name}/step" in tensors:
            key = _counter(optimizer, piece)
            steps[key] = max(steps.get(key, 0), int(tensors[f"{name}/step"]))
    for piece in {id(piece.held): piece for _, piece in trained.values()}.values():
        _reset_state(optimizer, piece, steps.get(_counter(optimizer, piece)))
    for name, (parameter, piece) in trained.items():
        master = tensors[f"{name}/master"]
        _fill(piece, piece.held, master)
        _set_compute_copy(parameter, piece, master)
        if f"{name}/step" in tensors:
            for kind in _MOMENTS:
                _fill(piece, optimizer.state[piece.held][kind], tensors[f"{name}/{kind}"])
        _set_settings(optimizer.param_groups[piece.group], tensors[f"{name}/settings"].tolist())
    _relink(engine, has_state=all(optimizer.state.get(piece.held) for _, piece in trained.values()))

    scaler = _dynamic_loss_scaler(engine)
    if scaler is not None and _LOSS_SCALER in tensors:
        scale, *counts = tensors[_LOSS_SCALER].tolist()
        for field, value in zip(_LOSS_SCALER_FIELDS, (scale, *map(int, counts)), strict=True):
            setattr(scaler, field, value)


def restore_progress(
    engine: MeftEngine, model_states: Mapping[str, Any], *, lr_scheduler: bool = True
) -> dict[str, Any]:
    """Set what DeepSpeed's model states say of a run and no ZeRO stage or number of ranks changes.

    These are the counts of steps, of samples and of skipped steps, the states of the learning rate's scheduler and of
    the samplers of data and tokens, and the module's persistent buffers. Nothing is changed if it raises.

    Args:
        model_states: from rank 0's file of any stage, which ``torch.load`` reads with ``weights_only=True``, unless the
            client's state or the scheduler's holds more than tensors and plain values.
        lr_scheduler: whether to restore the scheduler of the learning rate.

    Returns:
        The client's state, as ``load_checkpoint`` returns it.

    Raises:
        MeftConfigError: if a buffer has another shape.
    """
    saved = {name: model_states["module"][name] for name in model_states["buffer_names"]}
    buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in saved}
    for name, buffer in buffers.items():
        if saved[name].shape != buffer.shape:
            raise MeftConfigError(
                f"the buffer {name} was saved with shape {tuple(saved[name].shape)}, where {tuple(buffer.shape)} is "
                "needed"
            )
    for name, buffer in buffers.items():
        buffer.copy_(saved[name])

    loader = engine.training_dataloader
    parts = {
        "lr_scheduler": engine.lr_scheduler if lr_scheduler else None,
        "random_ltd": engine.random_ltd_scheduler if engine.random_ltd_enabled() else None,
        "data_sampler": loader.data_sampler if loader is not None and engine.curriculum_learning_enabled() else None,
    }
    for key, part in parts.items():
        if part is not None and model_states[key] is not None:
            part.load_state_dict(model_states[key])
    engine.global_steps = model_states["global_steps"]
    engine.global_samples = model_states["global_samples"]
    engine.skipped_steps = model_states["skipped_steps"]
    left = set(_STATE_OF_ENGINE) - (set() if lr_scheduler else {"lr_scheduler"})
    return {key: value for key, value in model_states.items() if key not in left}


# Where DeepSpeed has it


def _trained(engine: MeftEngine) -> dict[str, tuple[nn.Parameter, _Piece]]:
    """The parameters that the optimizer trains, by their names and in the order of the model."""
    pieces = {id(parameter): piece for parameter, piece in _pieces(engine)}
    return {name: (p, pieces[id(p)]) for name, p in engine.module.named_parameters() if id(p) in pieces}


def _pieces(engine: MeftEngine) -> Iterator[tuple[nn.Parameter, _Piece]]:
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for index, parameters in enumerate(optimizer.fp16_groups):
            held, group = optimizer.fp32_partitioned_groups_flat[index], optimizer.sub_group_to_group_id[index]
            for parameter in parameters:
                _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                # The last parts are padded, and there may be more ranks than elements.
                first = min(size * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
                size = min(size, parameter.ds_numel - first)
                yield parameter, _Piece(held, slice(start, start + size), slice(first, first + size), group)
    elif stage:
        for group, parameters in enumerate(optimizer.bit16_groups):
            held = optimizer.single_partition_of_fp32_groups[group]
            for parameter in parameters:
                place = part = slice(0, 0)
                if parameter._hp_mapping is not None:
                    place = _as_slice(parameter._hp_mapping.hp_fragment_address)
                    part = _as_slice(parameter._hp_mapping.lp_fragment_address)
                yield parameter, _Piece(held, place, part, group)
    elif isinstance(optimizer, FP16_Optimizer):
        for group, (parameters, held) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)):
            start = 0
            for parameter in parameters:
                yield parameter, _Piece(held, slice(start, start + parameter.numel()), slice(None), group)
                start += parameter.numel()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for group, pairs in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)):
            for parameter, held in zip(*pairs, strict=True):
                yield parameter, _Piece(held, ..., slice(None), group)
    else:
        for group, settings in enumerate(optimizer.param_groups):
            for parameter in settings["params"]:
                if parameter.requires_grad:
                    yield parameter, _Piece(parameter, ..., slice(None), group)


def _as_slice(address: Any) -> slice:
    return slice(address.start, address.start + address.numel)


def _whole(engine: MeftEngine, piece: _Piece, source: Tensor, shape: torch.Size) -> Tensor:
    """[shape] float32 on the CPU: a parameter's master or moment, put together from the parts of all ranks."""
    whole = torch.zeros(shape, dtype=torch.float32)
    whole.view(-1)[piece.part] = source.detach()[piece.place].flatten().to("cpu", torch.float32)
    if engine.zero_optimization_stage():
        # Each bit is set by one rank alone.
        whole = engine.ranks.sum_counts(whole.view(torch.int32)).view(torch.float32)
    return whole


def _fill(piece: _Piece, target: Tensor, whole: Tensor) -> None:
    """Write this rank's part of a whole tensor where its master or moment is."""
    part = target.detach()[piece.place]
    part.copy_(whole.flatten()[piece.part].view_as(part))


def _set_compute_copy(parameter: nn.Parameter, piece: _Piece, master: Tensor) -> None:
    """Set what the model computes with, which under stage 3 is this rank's part and, of a small one, the whole."""
    if is_partitioned(parameter):
        part = master.flatten()[piece.part]
        parameter.ds_tensor.data[: part.numel()].copy_(part)
    if parameter.numel():
        parameter.data.copy_(master)


def _relink(engine: MeftEngine, *, has_state: bool) -> None:
    """Let stages 1 and 2 find the optimizer's state anew, by which DeepSpeed shows it to others."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        if has_state:  # else it does so after the next step
            engine.optimizer._lazy_init_hp_params_optimizer_state()


def _dynamic_loss_scaler(engine: MeftEngine) -> Any:
    """ZeRO's; there is none without fp16, which stage 0 does not get."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if scaler is not None and scaler.dynamic else None


# The optimizers of Adam's family


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """``FusedAdam`` corrects a whole group by the steps of the last of its tensors, and counts no other's."""
    from deepspeed.ops.adam import FusedAdam

    return isinstance(optimizer, FusedAdam)


def _counter(optimizer: torch.optim.Optimizer, piece: _Piece) -> int:
    """What stands for the count of steps that rules a parameter."""
    return piece.group if _counts_by_group(optimizer) else id(piece.held)


def _steps_taken(optimizer: torch.optim.Optimizer, piece: _Piece) -> int:
    held = optimizer.param_groups[piece.group]["params"] if _counts_by_group(optimizer) else []
    # Stage 3 gives the optimizer its tensors for the time of a step only.
    return max(int(optimizer.state[tensor]["step"]) for tensor in [*held, piece.held] if optimizer.state.get(tensor))


def _reset_state(optimizer: torch.optim.Optimizer, piece: _Piece, steps: int | None) -> None:
    """Set the steps of what the optimizer holds, with moments of zero; ``None``: it never stepped."""
    if steps is None:
        optimizer.state.pop(piece.held, None)
        return
    state = optimizer.state[piece.held]
    # As they would be made in its first step.
    dtype = torch.float32 if getattr(optimizer, "fp32_optimizer_states", False) else piece.held.dtype
    for kind in _MOMENTS:
        state[kind] = torch.zeros_like(piece.held, dtype=dtype, requires_grad=False)
    state["step"] = steps
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        group = optimizer.param_groups[piece.group]
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.tensor(float(steps), device=piece.held.device if on_device else "cpu")


def _set_settings(group: dict[str, Any], settings: list[float]) -> None:
    lr, beta1, beta2, eps, weight_decay = settings
    group.update(betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


# What is refused


def _require(trained: Mapping[str, tuple[nn.Parameter, _Piece]], tensors: Mapping[str, Tensor]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, (parameter, _) in trained.items():
        shape = tuple(full_shape(parameter))
        expected |= {f"{name}/master": shape, f"{name}/settings": (5,)}
        state = {f"{name}/step": (), **{f"{name}/{kind}": shape for kind in _MOMENTS}}
        if any(kind in tensors for kind in state):
            expected |= state
    for name, needed in expected.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != needed:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise MeftConfigError(f"the saved state of {name} {found}, where {needed} is needed")
    for name in tensors:
        if name not in expected and name != _LOSS_SCALER:
            raise MeftConfigError(f"{name} was saved, and no parameter of that name is trained here")


def _require_equal_settings(trained: Mapping[str, tuple[nn.Parameter, _Piece]], tensors: Mapping[str, Tensor]) -> None:
    first: dict[int, tuple[str, list[float]]] = {}
    for name, (_, piece) in trained.items():
        settings = tensors[f"{name}/settings"].tolist()
        other, expected = first.setdefault(piece.group, (name, settings))
        if settings != expected:
            raise MeftConfigError(
                f"{name} and {other} were saved with other settings (lr, betas, eps, weight decay: {settings} and "
                f"{expected}), and are in one parameter group here"
            )
