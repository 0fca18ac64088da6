"""`MeftEngine`: a DeepSpeedEngine that also trains sparse adapter rows. Hooks only; the work is done elsewhere."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from meft_engine import trainer_logs, watching
from meft_engine.adapter.attach import DTYPES, AttachedAdapters, attach
from meft_engine.checkpoint import deepspeed_files, engine_state, export, folders, save_pretrained
from meft_engine.checkpoint.saver import CheckpointSaver
from meft_engine.config import MeftConfig, MeftConfigError, find_block
from meft_engine.cores import claim_cores, rank_cores, running_on
from meft_engine.joint_norm import PlainJointNorm, install_joint_norm
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.optim.worker import UpdateWorker
from meft_engine.parallel.leftovers import remove_leftovers
from meft_engine.parallel.ranks import find_ranks
from meft_engine.parallel.shared_step import SharedRows
from meft_engine.param_groups import (
    as_groups,
    freeze_base,
    rebuild_groups,
    require_adam,
    undo_construction_step,
)
from meft_engine.phases import PhaseClock, phase, use_clock
from meft_engine.report import describe, make_report, training_figures
from meft_engine.router_lr import scale_router_steps
from meft_engine.row_step import RowStep
from meft_engine.support import base_to_come, compute_dtype_of, require_support, require_support_of_ranks


def _needs_block(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a method of ``DeepSpeedEngine`` as it is in an engine without an enabled block."""

    @functools.wraps(hook)
    def choose(self: MeftEngine, *args: Any, **kwargs: Any) -> Any:
        if self.meft_config is None:
            return getattr(super(MeftEngine, self), hook.__name__)(*args, **kwargs)
        return hook(self, *args, **kwargs)

    return choose


class MeftEngine(DeepSpeedEngine):
    """DeepSpeed's engine with MEFT adapters beside the model's FFNs.

    Built by :func:`meft_engine.initialize`, or by ``deepspeed.initialize`` after :func:`meft_engine.enable`. It takes
    what ``DeepSpeedEngine`` takes; the ``"meft"`` block of the configuration says the rest. Without a block, or with
    ``"enabled": false``, it does what ``DeepSpeedEngine`` does, which every overridden method sees to by
    :func:`_needs_block`.

    Raises:
        MeftConfigError: before anything is allocated, for what cannot work.
    """

    meft_config: MeftConfig | None = None

    def __init__(
        self,
        args: Any,
        model: nn.Module,
        optimizer: Any = None,
        model_parameters: Iterable[Any] | None = None,
        *,
        config: dict[str, Any],
        config_class: Any,
        **kwargs: Any,
    ) -> None:
        block = find_block(config)
        if block is None:
            super().__init__(
                args, model, optimizer, model_parameters, config=config, config_class=config_class, **kwargs
            )
            return
        require_support(config_class, optimizer)
        require_support_of_ranks(block, config)
        self.ranks = ranks = find_ranks(block.communication.timeout)
        near = ranks.cores.cores if ranks.cores is not None else None
        claim_cores(near)
        if ranks.local_rank == 0:
            remove_leftovers()
        compute_dtype = compute_dtype_of(block, config_class)
        device = get_accelerator().current_device_name()
        # Read now: a generator that filters by requires_grad means the parameters as the caller left them.
        client_built = isinstance(optimizer, torch.optim.Optimizer)
        groups = optimizer.param_groups if client_built else as_groups(model, model_parameters)
        with running_on(near):
            attached = attach(
                model,
                block,
                compute_dtype=compute_dtype,
                device=device,
                ranks=ranks,
                base_to_come=base_to_come(model, device, config_class),
            )
        if block.adapter.freeze_base:
            freeze_base(model)
            for adapter in attached.adapters.values():
                adapter.router.requires_grad_(block.trains_routers)

        home = rebuild_groups(groups, attached)
        if not client_built:
            # A flat list stays one, for callables that build the optimizer from it.
            flat = len(groups) == 1 and groups[0].keys() == {"params"}
            model_parameters = groups[0]["params"] if flat else groups
        self.meft_config = block
        self.phases = PhaseClock()
        self.step_losses: deque[tuple[int, Tensor]] = deque(maxlen=10_000)  # with the step that each belongs to
        self._window_loss: Tensor | None = None
        super().__init__(args, model, optimizer, model_parameters, config=config, config_class=config_class, **kwargs)

        require_adam(self.basic_optimizer)
        undo_construction_step(self.optimizer)
        self.meft_adapters = attached
        with attached.measured(), running_on(near):
            self.row_optimizer = _row_optimizer(attached, home, block)
        self._joint_norm = install_joint_norm(self)
        check_others = ranks.lifeline.check if ranks.size > 1 else None
        timeout = block.optimizer.worker_timeout
        self._row_step = RowStep(
            self.row_optimizer,
            self._joint_norm,
            self.gradient_clipping(),
            UpdateWorker(timeout, check_others=check_others) if block.optimizer.overlaps(device) else None,
            [table.name for table in attached.tables()],
            _shared_rows(self, attached, block) if ranks.size > 1 else None,
            attached.hot_rows(),
        )
        self.row_optimizer.follow(self.basic_optimizer.param_groups)
        self._window_micro_steps = 0
        for adapter in attached.adapters.values():
            vars(adapter).update(loss_factor=self._loss_factor, at_boundary=self.is_gradient_accumulation_boundary)
        scale = block.router.lr_scale
        self._router_hooks = scale_router_steps(self, attached, scale) if scale != 1.0 else []
        save_pretrained.install(self)
        saving = block.checkpoint
        self._saver = CheckpointSaver(
            self,
            background=saving.async_save,
            snapshot_bytes=saving.snapshot_bytes,
            keep_last=saving.keep_last,
        )
        self._watch = watching.Watch(self)
        watching.attach_to_model(self, self._watch)
        trainer_logs.extend()
        describe(attached, self.row_optimizer, ranks)

    # The step

    @_needs_block
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        use_clock(self.phases)
        self.phases.end("backward")  # of one that failed
        with phase("forward"), self._inside("forward"):
            return super().forward(*inputs, **kwargs)

    @_needs_block
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        self._begin_backward()
        scaled = super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        own = scaled.detach().float()
        self._window_loss = own if self._window_loss is None else self._window_loss + own
        return scaled

    @_needs_block
    def _backward_prologue(self) -> None:
        self._begin_backward()  # where the script calls loss.backward() itself
        super()._backward_prologue()

    def _begin_backward(self) -> None:
        use_clock(self.phases)
        if not self.phases.is_open("backward"):
            self.phases.begin("backward")
            self._mark("backward", inside=True)

    @_needs_block
    def _backward_epilogue(self) -> None:
        super()._backward_epilogue()
        self._window_micro_steps += 1
        self.phases.end("backward")
        self._mark("backward", inside=False)

    def _loss_factor(self) -> float:
        """What the loss of a micro-step is multiplied by before its backward."""
        return (getattr(self.optimizer, "loss_scale", None) or 1.0) / self.gradient_accumulation_steps()

    @_needs_block
    def clip_fp32_gradients(self) -> None:
        if isinstance(self._joint_norm, PlainJointNorm):
            self._joint_norm.clip()

    def _mark(self, place: str, *, inside: bool) -> None:
        """Tell the other ranks how far training is here; evaluation says nothing of that."""
        if self.training:
            places = ("forward", "backward", "step")
            self.ranks.lifeline.mark(self.micro_steps, places.index(place), inside=inside)

    @contextmanager
    def _inside(self, place: str) -> Iterator[None]:
        self._mark(place, inside=True)
        with self.ranks.communicating():
            yield
        self._mark(place, inside=False)

    @_needs_block
    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        with self._inside("step"):
            self._step_with_rows(lr_kwargs)

    def _step_with_rows(self, lr_kwargs: dict[str, Any] | None) -> None:
        use_clock(self.phases)
        self._saver.check()
        # A bare optimizer has no such attribute, and DeepSpeed's fused one for bf16 has None.
        loss_scale = getattr(self.optimizer, "loss_scale", None) or 1.0
        self._row_step.begin(self.basic_optimizer.param_groups, loss_scale)
        with phase("optimizer"):
            super()._take_model_step(lr_kwargs)
        self._global_grad_norm = self._row_step.finish(applied=self._step_applied)
        for adapter in self.meft_adapters.adapters.values():
            adapter.after_step(applied=self._step_applied)
        self._window_micro_steps = 0
        if self._window_loss is not None:
            self.step_losses.append((self.global_steps, self._window_loss))
            self._window_loss = None
        self._watch.after_step()

    def synchronize_rows(self) -> None:
        """Wait until every row is up to date on the host: before you look at tables or at ``row_optimizer.state``
        yourself.

        Raises:
            UpdateError: if the thread that updates rows failed, ended or hangs.
            NonFiniteRowsError: if rows that the device owns are infinite or NaN.
        """
        self._row_step.bring_home()

    @_needs_block
    def train(self, mode: bool = True) -> None:
        self._row_step.drain()
        super().train(mode)

    @_needs_block
    def eval(self) -> None:
        self._row_step.drain()
        super().eval()

    @_needs_block
    def destroy(self) -> None:
        """Finish the rows' updates, end their thread and give the host memory back, besides what DeepSpeed does."""
        save_pretrained.uninstall(self.module)
        watching.detach_from_model(self.module)
        for hook in self._router_hooks:
            hook.remove()  # the optimizer may be the caller's, and live on
        with ExitStack() as last:  # whatever fails before
            last.callback(super().destroy)
            last.callback(self.meft_adapters.close)
            last.callback(self.row_optimizer.close)
            last.callback(claim_cores, None)
            last.callback(self.ranks.close)
            last.callback(self._row_step.close)
            last.callback(self._saver.close)
            self._watch.finish()

    # Saving

    @_needs_block
    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's checkpoint, with rows, moments, steps and random state as safetensors in its ``meft`` folder.

        It is there whole, under its name, or not at all. With ``checkpoint.async_save`` this returns before it is.

        Raises:
            RuntimeError: inside an accumulation window, whose partial gradients no checkpoint holds.
            CheckpointSaveError: if it could not be written, or the one before in the background could not.
        """
        engine_state.require_boundary(self._window_micro_steps, self.gradient_accumulation_steps())
        use_clock(self.phases)
        with phase("save"):
            self.synchronize_rows()
            self._saver.save(
                Path(save_dir),
                str(tag) if tag is not None else f"global_step{self.global_steps}",
                save_latest=save_latest,
                write_deepspeed=lambda partial: super(MeftEngine, self).save_checkpoint(
                    save_dir,
                    partial,
                    client_state=client_state or {},
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters or not self.meft_config.checkpoint.save_base,
                ),
            )
        return True

    @_needs_block
    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """Resume from what :meth:`save_checkpoint` wrote.

        Raises:
            MeftConfigError: if the checkpoint is of another model or another adapter.
            FileNotFoundError: if a file is missing, ``latest`` included.
        """
        self._watch.conclude()
        self._row_step.let_go()
        self._saver.finish()
        folder = folders.find(Path(load_dir), tag)
        resume = load_optimizer_states and not load_module_only
        engine_state.require_match(self, folder, resume=resume)
        if not engine_state.has_its_layout(self, folder):
            schedules = load_lr_scheduler_states and not load_module_only
            client_state = engine_state.load_parameters(self, folder, resume=resume, lr_scheduler=schedules)
            path = str(folder)
        else:
            with deepspeed_files.without_code(self.checkpoint_engine):
                # DeepSpeed must not insist on a base that was not saved; what differs from ours has been refused above.
                path, client_state = super().load_checkpoint(
                    load_dir,
                    folder.name,
                    load_module_strict=load_module_strict and self.meft_config.checkpoint.save_base,
                    load_optimizer_states=load_optimizer_states,
                    load_lr_scheduler_states=load_lr_scheduler_states,
                    load_module_only=load_module_only,
                    custom_load_fn=custom_load_fn,
                )
        engine_state.load(self, folder, resume=resume)
        self._window_micro_steps = 0
        self._watch.restart()
        return path, client_state

    @_needs_block
    def module_state_dict(self, *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> dict[str, Any]:
        state = super().module_state_dict(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)
        if exclude_frozen_parameters:
            # DeepSpeed leaves a frozen parameter in under its second name (lm_head.weight, where tied).
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    @_needs_block
    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Savers ask before they gather the weights of ZeRO stage 3; here they get the little that trains."""
        return True

    @_needs_block
    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        return super()._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)

    def save_adapter(
        self,
        folder: str | Path,
        *,
        dtype: Literal["bf16", "fp32"] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapter alone (for :func:`meft_engine.load_adapter`) to ``folder``.

        Args:
            dtype: of the rows there; ``None``: as the model computes with them.
            state_dict: of the model, if it is at hand; under ZeRO stage 3 it spares gathering the routers, for which
                all ranks have to call this. Rank 0 writes.
        """
        self.synchronize_rows()
        export.save_adapter(
            self.meft_adapters,
            Path(folder),
            write=self.ranks.rank == 0,
            read=self.row_optimizer.current_masters,
            dtype=DTYPES[dtype] if dtype is not None else None,
            state_dict=state_dict,
            figures=training_figures(self),
        )

    def meft_report(self) -> dict[str, Any]:
        """What the adapter is, uses and has touched so far; bytes are counted where they are allocated."""
        return make_report(self.meft_adapters, self.row_optimizer)


def _shared_rows(engine: MeftEngine, attached: AttachedAdapters, block: MeftConfig) -> SharedRows:
    """Gradients are averaged as DeepSpeed averages those of its parameters: by a mean over ranks that see different
    data, or by a sum where the engine was told so (which ZeRO stage 3 ignores)."""
    if engine.seq_dp_world_size != engine.ranks.size:
        raise MeftConfigError(
            f"DeepSpeed reduces gradients over {engine.seq_dp_world_size} of {engine.ranks.size} ranks, which is not "
            "supported with MEFT; for sequence parallelism pass an mpu whose get_sequence_data_parallel_group holds all"
        )
    mean = engine.gradient_average or engine.zero_optimization_partition_weights()
    different = engine.ranks.size / engine.sequence_parallel_size
    shape = block.adapter
    return SharedRows(
        engine.ranks,
        attached.tables(),
        shape.rows // shape.resolved_num_experts,
        dtype=DTYPES[block.communication.dtype],
        factor=1 / different if mean else 1.0,
    )


def _row_optimizer(attached: Any, home: dict[str, int], block: MeftConfig) -> SparseCPUAdam:
    scale = block.optimizer.lr_scale
    groups = []
    for index in sorted(set(home.values())):
        adapters = [adapter for name, adapter in attached.adapters.items() if home[name] == index]
        values_scale = scale * block.optimizer.value_lr_scale
        groups += [
            {"tables": [adapter.keys for adapter in adapters], "follows": index, "lr_scale": scale},
            {"tables": [adapter.values for adapter in adapters], "follows": index, "lr_scale": values_scale},
        ]
    return SparseCPUAdam(
        groups,
        mode=block.optimizer.mode,
        moments_dtype=DTYPES[block.optimizer.moments_dtype],
        seed=block.adapter.seed,
        threads=block.optimizer.num_threads or len(rank_cores()),
        huge_pages=block.offload.huge_pages,
    )
