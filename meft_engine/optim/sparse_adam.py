"""`SparseCPUAdam`: AdamW that reads and writes only the rows that were touched."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from meft_engine.offload.hot_rows import HotRows
from meft_engine.offload.memory import host_zeros
from meft_engine.offload.tensor import NonFiniteRowsError, PartiallyOffloadedTensor
from meft_engine.optim.history import StepHistory
from meft_kernels.dispatch import row_passes
from meft_kernels.owned import BiasCorrections
from meft_kernels.rows import AdamStep, Coast, paired_moments

# Between two signs of life an update works on about this many elements.
_BEAT_ELEMENTS = 1 << 24


__all__ = ["NonFiniteRowsError", "RowUpdate", "SparseCPUAdam", "run_now"]


@dataclass
class RowUpdate:
    """The update of one table in one step, complete: it may run at once or later, on any thread."""

    table: PartiallyOffloadedTensor
    state: dict[str, Tensor]
    rows: Tensor
    grad: Tensor
    adam: AdamStep
    coast: Coast | None
    threads: int
    publish: Callable[[RowUpdate, Callable[[], None]], None] | None = None
    """Sends the updated rows to ranks that do not share their memory, and takes theirs; ``None``: there are none."""

    def run(self, beat: Callable[[], None] = lambda: None) -> None:
        """Update the rows; ``beat`` is called from time to time.

        Raises:
            NonFiniteRowsError: if rows are no longer finite.
        """
        with self.table.writing():
            infinite = 0
            for part in self._parts():
                self.table.about_to_change(part.rows, beat)
                infinite += row_passes().adam_rows(
                    self.table.row_table(**self.state),
                    part.rows,
                    part.grad,
                    part.adam,
                    part.coast,
                    threads=self.threads,
                )
                beat()
            self.table.refresh(self.rows)
            if self.publish is not None:
                self.publish(self, beat)
            self.table.require_finite(infinite)

    def _parts(self) -> Iterator[RowUpdate]:
        """The same update in parts that each last a fraction of a second."""
        block = max(1, _BEAT_ELEMENTS // self.table.width)
        if self.rows.numel() <= block:
            yield self
            return
        for start in range(0, self.rows.numel(), block):
            part = slice(start, start + block)
            coast = self.coast
            yield replace(
                self,
                rows=self.rows[part],
                grad=self.grad[part],
                coast=coast._replace(of_row=coast.of_row[part]) if coast is not None else None,
            )


def run_now(updates: Iterable[RowUpdate]) -> None:
    """Run updates on this thread."""
    for update in updates:
        update.table.expect_update(None)
        update.run()


class SparseCPUAdam(torch.optim.Optimizer):
    """AdamW over the touched rows of partially offloaded tensors. For a row at its step t:

        m = β₁ m + (1 − β₁) g,  v = β₂ v + (1 − β₂) g²
        w = (1 − lr · λ) w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

    which is AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, algorithm 2) as torch.optim.AdamW has it.

    ``mode`` says what happens to rows that get no gradient:

    * ``"lazy"``: nothing. A row counts its own steps, so its bias correction is that of its own history; while it is
      idle its moments do not decay and its weights are not decayed.
    * ``"dense_equivalent"``: what dense AdamW does to them. It is made up for when a row is next needed: values at any
      read, keys (and what is stored) when they next get a gradient. Reading changes nothing that is stored.

    Args:
        tables: tensors, or groups ``{"tables": [...], "lr": ..., ...}`` as torch's optimizers take parameter groups.
        lr, betas, eps, weight_decay: AdamW's, for groups that do not say otherwise.
        mode: see above.
        moments_dtype: ``torch.float32``, or ``torch.bfloat16`` with stochastic rounding, whose random bits are a hash
            of seed, table, row, column and step, so that they do not depend on threads, ranks or a resume.
        seed: of those. threads: of an update. huge_pages: for the state, as ``host_zeros`` has them.

    State of a table: ``step`` [r] int32 (lazy: the row's own; else the step that the row is current through),
    ``exp_avg`` and ``exp_avg_sq`` [r, d], on the host. Of a table that several ranks share, only the rows that are
    this rank's count; where rows are brought to date at a read, all do.
    """

    def __init__(
        self,
        tables: Iterable[PartiallyOffloadedTensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mode: Literal["lazy", "dense_equivalent"] = "lazy",
        moments_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        threads: int = 1,
        huge_pages: bool = True,
    ) -> None:
        groups = list(tables)
        if groups and not isinstance(groups[0], dict):
            groups = [{"tables": groups}]
        self._table_of: dict[int, PartiallyOffloadedTensor] = {}
        for group in groups:
            members = list(group.pop("tables"))
            group["params"] = [table.handle for table in members]
            self._table_of.update((id(table.handle), table) for table in members)
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.mode, self.moments_dtype, self._seed, self._threads = mode, moments_dtype, seed, threads
        self._corrections = [BiasCorrections() for _ in self.param_groups]
        self._histories = [StepHistory() for _ in self.param_groups] if mode == "dense_equivalent" else []
        for index, group in enumerate(self.param_groups):
            for handle in group["params"]:
                table = self._table_of[id(handle)]
                allocate = functools.partial(_allocate_state, table, huge_pages=huge_pages)
                if moments_dtype == torch.bfloat16:
                    moments = paired_moments(allocate((*handle.shape, 2), moments_dtype))
                else:
                    moments = [allocate(handle.shape, moments_dtype) for _ in range(2)]
                self.state[handle] = {
                    "step": allocate((table.rows,), torch.int32),
                    **dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True)),
                }
                if table.hot is not None:
                    table.hot.use_state(table, self.state[handle])
                if self._histories and not table.read_whole:
                    table.read_current = lambda rows, t=table, i=index: self._read_current(t, i, rows)

    def tables(self) -> list[PartiallyOffloadedTensor]:
        """All tables, in the order of the groups."""
        return [self._table_of[id(handle)] for group in self.param_groups for handle in group["params"]]

    def _hot_rows(self) -> list[HotRows]:
        """Of all layers."""
        return list(dict.fromkeys(table.hot for table in self.tables() if table.hot is not None))

    def follow(self, param_groups: list[dict[str, Any]]) -> None:
        """Take lr, betas, eps and weight decay from another optimizer's groups.

        A group of this optimizer follows the group at its ``follows`` index, with ``lr_scale`` times its lr.
        """
        for group in self.param_groups:
            leader = param_groups[group["follows"]]
            group.update({key: leader[key] for key in ("betas", "eps", "weight_decay")})
            group["lr"] = leader["lr"] * group.get("lr_scale", 1.0)

    def gradient_norm(self) -> float:
        """2-norm of all accumulated row gradients; not finite if any of them is not."""
        total = self.squared_gradient_norm()
        return math.sqrt(total) if total >= 0 else math.nan

    def squared_gradient_norm(self) -> float:
        """Its square, NaN if any gradient is."""
        return sum(table.squared_gradient_norm() for table in self.tables())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated row gradients."""
        for table in self.tables():
            table.clear_gradient()

    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: float = 1.0) -> float | None:
        """Update the rows that have a gradient, times ``grad_scale`` (loss unscaling and clipping in one factor)."""
        loss = closure() if closure is not None else None
        # What torch's optimizers promise: when this returns, the step is done.
        run_now(self.updates(grad_scale))
        self.update_hot_rows(grad_scale)
        return loss

    @torch.no_grad()
    def update_hot_rows(self, grad_scale: float = 1.0) -> None:
        """The same step for rows that the device owns, which is told to; nobody waits for it."""
        for corrections, group in zip(self._corrections, self.param_groups, strict=True):
            tables = [self._table_of[id(handle)] for handle in group["params"]]
            tables = [table for table in tables if table.hot is not None]
            most = max((table.hot.most_steps for table in tables), default=0) + 1
            on: dict[torch.device, tuple[Tensor, Tensor]] = {}
            for table in tables:
                adam = self._adam_step(table, group, grad_scale)
                if table.device not in on:
                    on[table.device] = corrections.of(adam, most, table.device)
                table.hot.update(table, adam, on[table.device])

    @torch.no_grad()
    def updates(self, grad_scale: float = 1.0) -> list[RowUpdate]:
        """Begin a step: one update for each table that has a gradient, in the order of the groups.

        All of them have to run before the next step begins.

        Raises:
            ValueError: if eps changes in the mode "dense_equivalent", or lr · weight decay reaches 1 there.
        """
        updates = []
        for history, group in zip(self._histories, self.param_groups, strict=False):
            if group["eps"] != group.setdefault("eps_of_history", group["eps"]) and history.steps:
                raise ValueError(
                    f"eps changes from {group['eps_of_history']:g} to {group['eps']:g}, but in the mode "
                    '"dense_equivalent" idle rows have steps to make up for that were taken with the former; keep it'
                )
        for index, group in enumerate(self.param_groups):
            for handle in group["params"]:
                table = self._table_of[id(handle)]
                gradient = table.gradient()
                if gradient is not None:
                    updates.append(self._update(table, index, gradient.rows, gradient.grad, group, grad_scale))
        for history, group in zip(self._histories, self.param_groups, strict=False):
            history.append(float(group["lr"]), group["weight_decay"], tuple(group["betas"]))
        return updates

    def _update(
        self,
        table: PartiallyOffloadedTensor,
        index: int,
        rows: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        grad_scale: float,
    ) -> RowUpdate:
        state, coast, now = self.state[table.handle], None, 0
        if self._histories:
            history = self._histories[index]
            coast, now = history.coast(state["step"].index_select(0, rows), group["eps"]), history.steps + 1
        adam = self._adam_step(table, group, grad_scale, now)
        return RowUpdate(table, state, rows, grad, adam, coast, self._threads)

    def _adam_step(
        self, table: PartiallyOffloadedTensor, group: dict[str, Any], grad_scale: float, now: int = 0
    ) -> AdamStep:
        lr, seed = float(group["lr"]), 0
        if self.moments_dtype == torch.bfloat16:
            seed = ((self._seed << 32) ^ zlib.crc32(table.name.encode())) * 0x9E3779B97F4A7C15 % (1 << 64)
        decay = 1 - lr * group["weight_decay"]
        return AdamStep(grad_scale, lr, tuple(group["betas"]), group["eps"], decay, now, seed)

    def _read_current(self, table: PartiallyOffloadedTensor, index: int, rows: Tensor) -> Tensor | None:
        state, eps = self.state[table.handle], self.param_groups[index]["eps"]
        coast = self._histories[index].coast(state["step"].index_select(0, rows), eps)
        if coast is None:
            return None
        return row_passes().read_coasted(table.row_table(**state), rows, coast, eps, threads=table.threads)

    def current_masters(self, table: PartiallyOffloadedTensor, rows: slice = slice(None)) -> Tensor:
        """The masters [n, d] float32 of consecutive rows, brought to date, for reading; what is stored stays as it is.

        Of rows that another rank owns, the compute copy.
        """
        with table.reading():
            found = None
            if self._histories:
                found = self._read_current(table, self._group_of(table), torch.arange(table.rows)[rows])
            return table.masters(rows) if found is None else found

    def groups_of_tables(self) -> dict[str, dict[str, Any]]:
        """By a table's name, the index of its group and that group's eps."""
        found = {table.name: self._group_of(table) for table in self.tables()}
        return {name: {"index": index, "eps": self.param_groups[index]["eps"]} for name, index in found.items()}

    def _group_of(self, table: PartiallyOffloadedTensor) -> int:
        return next(i for i, g in enumerate(self.param_groups) if any(h is table.handle for h in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers have it, with the history of steps where the mode needs one."""
        for hot in self._hot_rows():
            hot.bring_home()
        return {**super().state_dict(), "histories": self.histories()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy into the state as it is allocated, whose precision and place torch's own method would change."""
        for hot in self._hot_rows():
            hot.let_go()
        allocated = {handle: dict(state) for handle, state in self.state.items()}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for handle, state in allocated.items():
            for key, value in state.items():
                value.copy_(self.state[handle][key])
            self.state[handle] = state
        self.load_histories(state_dict["histories"])

    def saved_planes(self, table: PartiallyOffloadedTensor) -> dict[str, Tensor]:
        """What a checkpoint holds of a table's rows, itself and by kind: ``compute``, ``low`` in bf16, its state."""
        compute, low = table.planes()
        return {"compute": compute, **({"low": low} if low is not None else {}), **self.state[table.handle]}

    def histories(self) -> dict[str, Tensor]:
        """The settings of every step so far, one [steps, 4] float64 tensor for each group; empty where not needed."""
        return {f"group{index}/history": history.state() for index, history in enumerate(self._histories)}

    def load_histories(self, saved: dict[str, Tensor]) -> None:
        """Take back what :meth:`histories` gave."""
        for index, history in enumerate(self._histories):
            history.load(saved[f"group{index}/history"])

    def close(self) -> None:
        """Give back the memory of the state and of the tables; nothing of them is usable afterwards."""
        for table in self.tables():
            table.close()
        self.state.clear()

    def host_bytes(self) -> int:
        """Bytes of the optimizer's state on the host; of what the ranks of a node share, this rank's part."""
        return sum(self.host_bytes_by_kind().values())

    def host_bytes_by_kind(self) -> dict[str, int]:
        """The same, of ``moments`` and ``steps``."""
        found = {"moments": 0, "steps": 0}
        for table in self.tables():
            shared = table.shard is None or table.shard.shares_state
            for name, value in self.state[table.handle].items():
                found["steps" if name == "step" else "moments"] += table.share_of(value, shared)
        return found


def _allocate_state(
    table: PartiallyOffloadedTensor, shape: Sequence[int], dtype: torch.dtype, *, huge_pages: bool
) -> Tensor:
    """Zeros of which the rows are there that this process updates, or in the memory that readers share."""
    shard = table.shard
    if shard is not None and shard.shares_state:
        return shard.allocate(shape, dtype, shard.fills)
    return host_zeros(shape, dtype, huge_pages=huge_pages, present=shard.owned if shard is not None else None)
