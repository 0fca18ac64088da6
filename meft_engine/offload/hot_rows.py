"""Rows of a layer that the device owns: master, moments, step and gradient live there and are updated there.

They are the rows that micro-batches have used most of late, chosen anew every few steps. Nothing of them crosses
between host and device meanwhile; the host's own copy of them is old until they are brought home.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_engine.offload.memory import pieces
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.updates import StaleRowsError
from meft_kernels.dispatch import owned_passes
from meft_kernels.rows import AdamStep, RowTable, paired_moments
from meft_kernels.slots import OwnedRows

STEPS_BETWEEN_CHOICES = 8
"""The first choice is made after the first step."""

_DECAY = 0.9
"""Of a row's use, from step to step."""

_STAY = 1.25
"""What the use of a row counts that is there: rows of nearly equal use shall not go to and fro."""


@dataclass
class _Half:
    """What the device owns of one of the two tables, by place."""

    table: PartiallyOffloadedTensor
    rows: RowTable
    infinite: Tensor
    """[1] int32: rows that updates have made infinite or NaN."""
    gradients: Tensor | None = None
    """[H, d] float32; of rows that have not been touched, anything."""
    state: dict[str, Tensor] | None = None
    """The optimizer's, of all rows, on the host."""

    most_steps: int = 0
    """No row that is here has more steps behind it."""

    def on_host(self) -> RowTable:
        return self.table.row_table(**self.state)

    def row_bytes(self) -> int:
        return sum(part[:1].nbytes for part in self.rows if part is not None)


class HotRows:
    """At most H rows, the same of a layer's two tables.

    Args:
        keys, values: the tables, of the same shape, on a device whose memory is not the host's. most: H.
        moments_dtype: as the optimizer has it.
    """

    def __init__(
        self,
        keys: PartiallyOffloadedTensor,
        values: PartiallyOffloadedTensor,
        most: int,
        moments_dtype: torch.dtype,
    ) -> None:
        self.most, self._device = most, keys.device
        # With an element more, for what is no row.
        self._place_of_row = torch.full((keys.rows + 1,), -1, dtype=torch.int32, device=self._device)
        self._use = torch.zeros(keys.rows + 1, device=self._device)
        self._row_of_place = torch.zeros(most, dtype=torch.int64, device=self._device)
        self._rows = torch.empty(0, dtype=torch.int64)  # the same on the host, of the places that are taken
        # With an element more, for rows that have no place.
        self._touched = torch.zeros(most + 1, dtype=torch.bool, device=self._device)
        self._ahead = torch.zeros(most, dtype=torch.bool, device=self._device)  # of what the host has
        self._any_touched, self._any_ahead = False, False
        self.steps, self.promoted, self.demoted = 0, 0, 0
        """Optimizer steps so far, and rows that have come and gone in them."""
        self._halves = {table: self._half(table, moments_dtype) for table in (keys, values)}
        for table, half in self._halves.items():
            table.own_on_device(self, OwnedRows(half.rows.high, self._place_of_row))

    def _half(self, table: PartiallyOffloadedTensor, moments_dtype: torch.dtype) -> _Half:
        shape = (self.most, table.width)

        def empty(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.empty(*shape, *more, dtype=dtype, device=self._device)

        if moments_dtype == torch.bfloat16:
            moments = paired_moments(empty(moments_dtype, 2))
        else:
            moments = empty(moments_dtype), empty(moments_dtype)
        low = empty(torch.int16) if table.compute_dtype == torch.bfloat16 else None
        steps = torch.zeros(self.most, dtype=torch.int32, device=self._device)
        infinite = torch.zeros(1, dtype=torch.int32, device=self._device)
        return _Half(table, RowTable(empty(table.compute_dtype), low, *moments, steps), infinite)

    def use_gradients(self, keys: Tensor, values: Tensor) -> None:
        """Take gradients from these slots [H, d] float32."""
        for half, gradients in zip(self._halves.values(), (keys, values), strict=True):
            half.gradients = gradients

    def use_state(self, table: PartiallyOffloadedTensor, state: dict[str, Tensor]) -> None:
        """Take a row's moments and steps from this state of an optimizer, and bring them back there."""
        self._halves[table].state = state

    @property
    def rows(self) -> Tensor:
        """[n] int64, on the host: the rows that are here, by place."""
        return self._rows

    @property
    def most_steps(self) -> int:
        """No row that is here has more steps behind it."""
        return max(half.most_steps for half in self._halves.values())

    def steps_of(self, table: PartiallyOffloadedTensor) -> tuple[Tensor, Tensor]:
        """[n] int64 and [n] int32, on the host: the rows that are here, and how many steps each has behind it.

        Waits for the device.
        """
        return self._rows, self._halves[table].rows.step[: self._rows.numel()].cpu()

    # In a micro-step

    def touch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a micro-batch are about to get a gradient; the host waits for nothing.

        Args:
            rows: [U'] int64, distinct; r where there is none.

        Returns:
            [U'] int32: their places, −1 of rows that are the host's; and [U'] bool: whether a row is here and gets the
            first gradient of a window.
        """
        self._use[rows] += 1
        places = self._place_of_row[rows]
        here = torch.where(places >= 0, places, self.most).long()
        first = (places >= 0) & ~self._touched[here]
        self._touched[here] = True
        self._any_touched = True
        return places, first

    # In a step

    def squared_gradient_norm(self, table: PartiallyOffloadedTensor) -> float:
        """Of the rows that are here; waits for the device.

        Raises:
            NonFiniteRowsError: if the last update has made rows infinite or NaN.
        """
        count, half = self._rows.numel(), self._halves[table]
        if not count:
            return 0.0
        of_rows = torch.linalg.vector_norm(half.gradients[:count], dim=1, dtype=torch.float64).square()
        total = torch.where(self._touched[:count], of_rows, 0).sum()
        found, infinite = torch.stack((total, half.infinite[0].double())).tolist()
        table.require_finite(int(infinite))
        return found

    def update(self, table: PartiallyOffloadedTensor, adam: AdamStep, corrections: tuple[Tensor, Tensor]) -> None:
        """Tell the device to update the touched rows of one table.

        Args:
            corrections: of ``BiasCorrections``, for rows of up to ``most_steps`` + 1 steps.
        """
        count, half = self._rows.numel(), self._halves[table]
        if not count or not self._any_touched:
            return
        touched, rows = self._touched[:count], self._row_of_place[:count]
        # Those that are touched first.
        places = touched.logical_not().to(torch.int32).argsort(stable=True).int()
        number = touched.sum(dtype=torch.int32)[None]
        table.settle()
        half.infinite += owned_passes(self._device).adam_rows(
            half.rows, places, number, half.gradients, places, adam, corrections, rows[places.long()].int()
        )
        table.changed_there(rows, touched, half.rows.high[:count])
        half.most_steps += 1
        self._ahead[:count] |= touched
        self._any_ahead = True

    def forget_gradients(self) -> None:
        """Begin a new window."""
        self._touched.fill_(False)
        self._any_touched = False

    def after_step(self) -> None:
        """After an optimizer step, whose gradients are forgotten: choose anew which rows are here, now and then."""
        if self.steps % STEPS_BETWEEN_CHOICES == 0:
            self._choose()
        self.steps += 1
        self._use *= _DECAY

    def _choose(self) -> None:
        """Those of largest use; of equal ones the lowest. A row goes where another takes its place, and only there."""
        count, use = self._rows.numel(), self._use[:-1].clone()
        use[self._row_of_place[:count]] *= _STAY
        largest = use.sort(descending=True, stable=True)
        chosen = largest.indices[: self.most][largest.values[: self.most] > 0].cpu()
        arriving = chosen[~torch.isin(chosen, self._rows)]
        leaving = (~torch.isin(self._rows, chosen)).nonzero().flatten()
        leaving = leaving[: max(0, arriving.numel() - (self.most - count))]
        if arriving.numel():
            free = torch.arange(count, count + arriving.numel() - leaving.numel())
            self._swap(arriving, torch.cat((leaving, free)), leaving)

    def _swap(self, arriving: Tensor, places: Tensor, leaving: Tensor) -> None:
        """Bring rows to these places, of which ``leaving`` are taken as yet."""
        with ExitStack() as stack:
            for table in self._halves:
                stack.enter_context(table.reading())  # the host's updates of them come first
                table.settle()
            self._send_home(leaving)
            there = places.to(self._device)
            for half in self._halves.values():
                host = half.on_host()
                for some in pieces(slice(0, arriving.numel()), half.row_bytes()):
                    for into, source in zip(half.rows, host, strict=True):
                        if into is not None:
                            into[there[some]] = source[arriving[some]].to(self._device)
                half.most_steps = max(half.most_steps, int(host.step[arriving].max()))
        self._place_of_row[self._row_of_place[leaving.to(self._device)]] = -1
        self._row_of_place[there] = arriving.to(self._device)
        self._place_of_row[self._row_of_place[there]] = there.int()
        self._rows = torch.cat((self._rows, arriving[leaving.numel() :]))
        self._rows[places] = arriving
        self.promoted += arriving.numel()
        self.demoted += leaving.numel()

    # On the host

    def bring_home(self) -> None:
        """Let the host's rows be those that are here; waits for the device.

        Raises:
            NonFiniteRowsError: if an update has made rows infinite or NaN.
        """
        if not self._any_ahead:
            return
        for table, half in self._halves.items():
            table.require_finite(int(half.infinite))
        self._send_home(torch.arange(self._rows.numel()))
        self._any_ahead = False

    def let_go(self) -> None:
        """Give all rows back to the host, with their gradients, whatever they are.

        Raises:
            UpdateError: if the thread that should update the host's rows cannot.
        """
        if not self._rows.numel():
            return
        self._send_home(torch.arange(self._rows.numel()), damaged=True)
        touched = self._touched[: self._rows.numel()].nonzero().flatten()
        for table, half in self._halves.items():
            table.settle()
            table.accumulate(self._row_of_place[touched], half.gradients[touched])
            half.infinite.zero_()
        self.forget_gradients()
        self._place_of_row.fill_(-1)
        self.demoted += self._rows.numel()
        self._rows, self._any_ahead = self._rows[:0], False

    def _send_home(self, places: Tensor, *, damaged: bool = False) -> None:
        """Rows of these places [n] int64, as far as they are ahead of the host's.

        Args:
            damaged: go on if a table on the host cannot be read, which somebody is about to replace.
        """
        if not self._any_ahead:
            return
        places = places[self._ahead.cpu()[places]]
        if not places.numel():
            return
        there, rows = places.to(self._device), self._rows[places]
        for table, half in self._halves.items():
            with suppress(*([StaleRowsError] if damaged else [])), table.catching_up(rows):
                for some in pieces(slice(0, rows.numel()), half.row_bytes()):
                    for into, source in zip(half.on_host(), half.rows, strict=True):
                        if into is not None:
                            into[rows[some]] = source[there[some]].cpu()
        self._ahead[there] = False

    def device_bytes(self) -> int:
        """Of all that is kept for rows that are here, and of what says where and how much in use rows are."""
        own = (self._place_of_row, self._use, self._row_of_place, self._touched, self._ahead)
        halves = [(half.infinite, half.gradients, *half.rows) for half in self._halves.values()]
        return sum(part.nbytes for part in (*own, *(p for half in halves for p in half if p is not None)))
