"""`PartiallyOffloadedTensor`: a large table whose rows live in host memory and visit the device a few at a time.

It is the one object that knows where the copies of a row are. Everyone else asks it for rows and gives it gradients.
It is deliberately no ``nn.Parameter`` and no module attribute that DeepSpeed or ``Module.to`` could find: it must
neither be flattened, cast, broadcast nor moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meft_engine.offload.gradients import GradientAccumulator, RowGradient
from meft_engine.offload.host_rows import HostRows
from meft_engine.offload.memory import pieces
from meft_engine.offload.resident import ResidentRows
from meft_engine.offload.shard import Shard, Wait
from meft_engine.offload.slots import SlottedRows
from meft_engine.offload.traffic import Traffic
from meft_engine.offload.updates import StaleRowsError, Updates
from meft_engine.phases import phase
from meft_kernels import planes
from meft_kernels.dispatch import RowsAt, row_passes
from meft_kernels.quantized import QuantizedRows
from meft_kernels.rows import RowTable
from meft_kernels.slots import OwnedRows

if TYPE_CHECKING:
    from meft_engine.offload.hot_rows import HotRows


class NonFiniteRowsError(ArithmeticError):
    """An update has made rows infinite or NaN in the precision that the model computes with."""


class PartiallyOffloadedTensor:
    """Rows [r, d]: the fp32 master on the host, and a compute copy that the model reads.

    In bf16 a master is two planes of 16 bits (:mod:`meft_kernels.planes`), of which the upper one is the compute copy;
    in fp32 the master is the compute copy. Where ``resident`` (keys, which routing needs whole) and the model computes
    on an accelerator, that device holds the compute copy once more; else (values) rows are gathered on demand.
    A few rows may be the device's own (:mod:`meft_engine.offload.hot_rows`), which updates them there; whoever reads
    the host's rows here gets them as they are on the device.

    Updates may run on another thread. It says so beforehand (:meth:`expect_update`) and writes inside :meth:`writing`;
    whoever reads waits for what is expected, and never sees a row half written.

    Where several ranks train, each owns a ``shard`` of the rows: it alone has their lower planes and updates them. The
    compute copy is in memory that the ranks of a node share, and every update of the table is expected by all of them,
    of whomever's rows it is.

    Args:
        name: what error messages call it, such as ``model.layers.0.mlp/keys``.
        rows: r. width: d.
        device: where the model computes.
        compute_dtype: precision of the compute copy, ``torch.float32`` or ``torch.bfloat16``.
        resident: keep the whole compute copy on ``device``. resident_dtype: of that copy; int8: with a scale for each
            row, and what the model then computes with; ``None``: ``compute_dtype``.
        read_whole: readers want all of it as it is (keys); else rows that an optimizer has left behind are brought to
            date for whoever reads them. ``None``: if it is resident.
        trainable: accept gradients; ``False`` for inference, where they are ignored and no lower plane is kept.
        max_staleness: how many updates a reader may be behind where it does not ask for the latest rows.
        pin_memory, huge_pages: as :func:`host_zeros` has them. threads: for passes over rows on the host.
        shard: what other ranks own; ``None``: all rows are this process's.
        traffic: between host and device, beside the computation; ``None``: each copy is waited for.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        resident: bool,
        trainable: bool = True,
        max_staleness: int = 0,
        pin_memory: bool = False,
        huge_pages: bool = True,
        threads: int = 1,
        shard: Shard | None = None,
        traffic: Traffic | None = None,
        resident_dtype: torch.dtype | None = None,
        read_whole: bool | None = None,
    ) -> None:
        self.name = name
        self.shard = shard
        self._traffic = traffic
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype
        self.resident, self._resident_dtype = resident, resident_dtype or compute_dtype
        self.read_whole = resident if read_whole is None else read_whole
        self.trainable = trainable
        self.threads = threads
        self.handle = torch.zeros((), dtype=torch.float32).expand(rows, width)
        """Stands for the table where a tensor is asked for, such as in an optimizer's groups; it holds no rows."""

        self._host: HostRows | None = HostRows(
            name,
            self.handle.shape,
            compute_dtype,
            trainable=trainable,
            pin_memory=pin_memory,
            huge_pages=huge_pages,
            shard=shard,
        )
        self.updates = Updates(name, max_staleness, shard)
        """Who may read and write the rows when."""
        self._on_device: ResidentRows | SlottedRows | None = None
        if self._needs_copy_on(self.device):
            self._on_device = self._resident_on(self.device)
        elif traffic is not None:
            self._on_device = SlottedRows(
                self.handle.shape, compute_dtype, self.device, traffic.slots, traffic.updates, self.reading
            )
        self._refreshed = 0  # the update up to which the device's copy has followed those of other ranks
        self._gradient = GradientAccumulator(rows, threads, pin_memory=pin_memory and self.device.type == "cuda")
        self._largest_gather = 0
        self.read_current: Callable[[Tensor], Tensor | None] | None = None
        """Set by an optimizer that leaves idle rows behind: the masters [n, d] of some rows brought to date, or
        ``None`` if they are."""

        self.before_change: Callable[[PartiallyOffloadedTensor, Tensor | slice, Callable[[], None]], None] | None = None
        """Set by who is reading the rows as they are now: called with rows that are about to change, and with a
        function to call while that has to wait."""

        self.before_gradient: Callable[[], None] | None = None
        """Set by who still holds gradients back: gives them to :meth:`accumulate`, before the sum is asked for."""

        self.hot: HotRows | None = None
        """Rows that the device owns; ``None``: it may own none."""

        self.bytes_to_host = 0
        """Of gradients returned; where device and host are one, what would cross otherwise."""
        self._bytes_gathered = 0
        self._updated_there = 0  # how often the device has updated its own rows

    # Shape and contents

    @property
    def rows(self) -> int:
        """Number of rows r."""
        return self.handle.shape[0]

    @property
    def width(self) -> int:
        """Width d of a row."""
        return self.handle.shape[1]

    @property
    def owned(self) -> slice:
        """The rows that this process updates."""
        return self.shard.owned if self.shard is not None else slice(0, self.rows)

    @property
    def stored(self) -> list[slice]:
        """The rows whose optimizer state this process writes when all of it is set."""
        if self.shard is None:
            return [slice(0, self.rows)]
        return self.shard.fills if self.shard.shares_state else [self.shard.owned]

    @property
    def master(self) -> Tensor:
        """The fp32 masters [r, d], for reading: a new tensor where they are kept as planes, else the table itself.

        Of rows that another rank owns, the compute copy.
        """
        self._bring_home()
        with self.reading():
            return self._host.masters(slice(None)) if self._host.low is not None else self._host.high.float()

    def masters(self, rows: slice) -> Tensor:
        """[n, d] float32: those of consecutive rows, as :attr:`master` has them."""
        self._bring_home()
        with self.reading():
            return self._host.masters(rows)

    def planes(self) -> tuple[Tensor, Tensor | None]:
        """What is stored, itself: the bf16 plane and the lower plane, or the fp32 masters and ``None``."""
        self._bring_home()
        with self.reading():
            return self._host.high, self._host.low

    def row_table(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> RowTable:
        """The table with its moments and steps, as the passes over rows want it."""
        return RowTable(self._host.high, self._host.low, exp_avg, exp_avg_sq, step)

    def _bring_home(self) -> None:
        if self.hot is not None:
            self.hot.bring_home()

    def fill(self, source: Tensor, low: Tensor | None = None) -> None:
        """Set all rows.

        Args:
            source: [r, d] of any float dtype, on any device; or, with ``low``, the bf16 plane.
            low: [r, d] int16, the lower plane.

        Raises:
            ValueError: for another shape, or for a number that the compute copy cannot hold.
        """
        if source.shape != self.handle.shape:
            raise ValueError(f"{self.name} holds {tuple(self.handle.shape)}, not {tuple(source.shape)}")
        if low is None:
            for part in pieces(slice(0, self.rows), self.width * torch.float32.itemsize):
                self._host.split(source[part])  # refused before anything is changed
        self.fill_by(
            lambda part: planes.join(source[part].contiguous(), low[part]) if low is not None else source[part].float()
        )

    def fill_by(self, read: Callable[[slice], Tensor]) -> None:
        """Set all rows, some at a time; where there are several ranks, each of them calls this and writes what is its
        to write. If ``read`` raises, the table is unreadable until it is filled anew.

        Args:
            read: gives the masters [n, d] float32 of consecutive rows, of which only compute copies count where
                the rows are another rank's.

        Raises:
            ValueError: for a number that the compute copy cannot hold.
        """
        parts = [slice(0, self.rows)] if self.shard is None else self.shard.fills
        self.updates.forgive()
        with self._setting():
            for part in parts:
                for some in pieces(part, self.width * torch.float32.itemsize):
                    self._set(some, *self._host.split(read(some)))

    def write(self, rows: Tensor, source: Tensor) -> None:
        """Set some rows' masters from ``source`` [n, d] float32, and their compute copies.

        Where there are several ranks, each of them calls this, and rows that are not its to write are left to others.

        Args:
            rows: [n] int64.

        Raises:
            ValueError: for a finite number that is infinite in the compute copy.
            StaleRowsError: if an update failed midway.
        """
        compute, low = self._host.split(source)
        if self.shard is not None:
            mine = self.shard.is_filled(rows)
            rows, compute, low = rows[mine], compute[mine], low[mine] if low is not None else None
        with self._setting():
            self._set(rows, compute, low)

    @contextmanager
    def _setting(self) -> Iterator[None]:
        if self.hot is not None:
            self.hot.let_go()
        with self.reading():  # updates that are due come first
            pass
        self.updates.expected += 1
        with self.writing():
            yield

    def about_to_change(self, rows: Tensor | slice, beat: Callable[[], None] = lambda: None) -> None:
        """Say so before rows are written; waits until whoever still needs them as they are has them."""
        if self.before_change is not None:
            self.before_change(self, rows, beat)

    def _set(self, rows: Tensor | slice, compute: Tensor, low: Tensor | None) -> None:
        self.about_to_change(rows)
        self._host.put(rows, compute, low)
        self.refresh(rows)

    def refresh(self, rows: Tensor | slice) -> None:
        """Bring rows that have been written to the device's copy, where there is one; other ranks do so when they
        read next."""
        if self._on_device is None:
            return
        if self.shard is not None:
            self.shard.changed_at[rows] = self.updates.expected
        else:
            self._on_device.changed(rows, self._host.high)

    def _follow_others(self) -> None:
        """Bring what any rank has written since the last time to the device."""
        if self._on_device is None or self.shard is None or self._refreshed == self.updates.expected:
            return
        rows = (self.shard.changed_at > self._refreshed).nonzero().flatten()
        self._on_device.changed(rows, self._host.high)
        self._refreshed = self.updates.expected

    # Reading

    @contextmanager
    def reading(self, *, latest: bool = True) -> Iterator[Tensor | QuantizedRows]:
        """The compute copy [r, d], where it is kept whole; while inside, no update touches it.

        Args:
            latest: wait for every update that is expected; else ``max_staleness`` may be missing.

        Raises:
            StaleRowsError: if an update failed midway.
            UpdateError: if the thread that should update cannot.
        """
        with self.updates.reading(latest=latest):
            self._follow_others()
            if self._on_device is not None:
                self._on_device.land()
            yield self._on_device.table if isinstance(self._on_device, ResidentRows) else self._host.high

    def compute_copy(self) -> Tensor | QuantizedRows:
        """The whole compute copy [r, d] on the device. Only for a resident tensor."""
        if not self.resident:
            raise RuntimeError(f"{self.name} is not resident on the device; gather the rows that are needed")
        with self.reading() as table:
            return table

    def gather(self, rows: Tensor, version: int | None = None, *, latest: bool = True) -> Tensor:
        """Bring rows to the device.

        Args:
            rows: [n] int64 ids, on any device.
            version: the version that the caller saw before; ``None`` accepts the present one.
            latest: as in :meth:`reading`.

        Returns:
            [n, d] float32 on ``device``, the exact values of the compute copy.

        Raises:
            StaleRowsError: if the rows have been updated since ``version``.
        """
        if version is not None:
            self.require_version(version)
        self._count_gather(rows.numel())
        self._bring_home()
        with phase("gather"), self.reading(latest=latest) as table:
            if isinstance(self._on_device, ResidentRows):
                return table.index_select(0, rows.to(table.device)).to(self.device).float()
            rows = rows.to("cpu").contiguous()
            found = self._brought_to_date(rows)
            if found is None:
                found = row_passes().gather_rows(table, rows, threads=self.threads)
        return found.to(self.device)

    def expect(self, rows: Tensor, count: Tensor | None = None, *, latest: bool = True, keep: bool = False) -> None:
        """Say which rows :meth:`rows_at` will be asked for, so that they can come meanwhile; arguments as there."""
        if self._visits_slots():
            with phase("gather"):
                self._on_device.expect(rows, count, self.version, latest=latest, keep=keep)

    @contextmanager
    def rows_at(
        self,
        rows: Tensor,
        version: int | None = None,
        *,
        count: Tensor | None = None,
        latest: bool = True,
        keep: bool = False,
        backward: bool = False,
    ) -> Iterator[RowsAt]:
        """As :meth:`gather`, but for the time in which they are used: where device and host are one, no copies, and
        else copies that the host does not wait for, in the compute copy's dtype.

        Args:
            count: [1] int32, on the device: how many of the ``rows`` are meant, the first ones; ``None``: all.
            keep: let the rows stay on the device for the backward and further micro-steps, if there is room.
            backward: a backward asks, so that the layer before will ask next.
        """
        if version is not None:
            self.require_version(version)
        if self._visits_slots():
            with phase("gather"):
                place = self._on_device.at(rows, count, self.version, latest=latest, keep=keep, backward=backward)
            yield place
            return
        resident = isinstance(self._on_device, ResidentRows)
        if count is not None and not resident:
            rows = rows[: int(count)]
        if self.device.type != "cpu" and self._traffic is None:
            yield RowsAt(self.gather(rows, latest=latest), None)
            return
        if self._on_device is not None and not resident:
            self._count_gather(rows.numel())
            yield RowsAt(self._staged(rows.to("cpu"), latest), None)
            return
        self._count_gather(rows.numel())
        with ExitStack() as stack:
            with phase("gather"):
                table = stack.enter_context(self.reading(latest=latest))
                current = None if resident else self._brought_to_date(rows)
            yield RowsAt(table, rows) if current is None else RowsAt(current, None)

    def _visits_slots(self) -> bool:
        # Rows that are brought to date for each reader are new every time.
        return isinstance(self._on_device, SlottedRows) and self.read_current is None

    def _staged(self, rows: Tensor, latest: bool) -> Tensor:
        """[n, d] on the device, brought to date, for whatever it is told from now on."""
        with phase("gather"), self.reading(latest=latest) as table:
            current = self._brought_to_date(rows)
            found, copy = self._traffic.rows.bring(table, rows) if current is None else self._traffic.rows.send(current)
        copy.hold_device()
        return found

    def _brought_to_date(self, rows: Tensor) -> Tensor | None:
        """[n, d] float32: the compute copies of rows of which an optimizer has left some behind; ``None``: of none."""
        found = self.read_current(rows) if self.read_current is not None else None
        if found is None or self.compute_dtype != torch.bfloat16:
            return found
        return planes.split(found)[0].float()

    def _count_gather(self, count: int) -> None:
        self._largest_gather = max(self._largest_gather, count)
        if not self.resident:
            self._bytes_gathered += count * self.width * self.compute_dtype.itemsize

    @property
    def bytes_to_device(self) -> int:
        """Of rows gathered; where device and host are one, what would cross otherwise. May wait for the device."""
        brought = self._on_device.visits()[1] * self._on_device.row_bytes if self._visits_slots() else 0
        return self._bytes_gathered + brought

    @property
    def bytes_of_updates(self) -> int:
        """Of updated rows that were sent to the device's copy."""
        return self._on_device.bytes_sent if isinstance(self._on_device, ResidentRows) else 0

    def visits(self) -> tuple[int, int]:
        """Rows that were asked for while they were still on the device, and rows that were brought. May wait for it."""
        return self._on_device.visits() if self._visits_slots() else (0, 0)

    @property
    def version(self) -> int:
        """Counts updates, those included that are expected and not yet done."""
        return self.updates.expected + self._updated_there

    def require_version(self, version: int) -> None:
        """Check that the rows are those of ``version``.

        Raises:
            StaleRowsError: if they have been updated since.
        """
        if version != self.version:
            raise StaleRowsError(
                f"{self.name} was updated between a forward and its backward (version {version}, now {self.version}); "
                "run backward before step"
            )

    # Gradients

    def accumulate(
        self, rows: Tensor, grad: Tensor, squared_norms: Tensor | None = None, count: Tensor | None = None
    ) -> None:
        """Add the gradient of some rows. Rows not named get none; the sum follows the order of the calls.

        Args:
            rows: [n] int64, no two equal. grad: [n, d]; the tensor is taken over, not copied.
            squared_norms: [n] float64, of the rows of ``grad``, where they are known.
            count: [1] int32, on the device: how many of them there are, the first ones; ``None``: all.

        Raises:
            IndexError: for rows that the table does not have; of gradients that arrive later, when they are asked for.
        """
        if not self.trainable or not rows.numel():
            return
        grad = grad.to(torch.float32).contiguous()
        if self._traffic is not None:
            self._traffic.gradients.send(rows, grad, squared_norms, count, self.room_for_gradients, self._add_gradient)
            return
        if count is not None:
            rows, grad = rows[: int(count)], grad[: int(count)]
            squared_norms = squared_norms[: int(count)] if squared_norms is not None else None
        self._add_gradient(rows.to("cpu"), grad.to("cpu"), squared_norms)

    def _add_gradient(self, rows: Tensor, grad: Tensor, squared_norms: Tensor | None) -> None:
        if not rows.numel():
            return
        self.bytes_to_host += grad.nbytes
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= self.rows:
            raise IndexError(f"{self.name} has {self.rows} rows; a gradient names rows {least} to {most}")
        self._gradient.add(rows, grad, squared_norms)

    def _arrived(self) -> GradientAccumulator:
        """The sum, once everything that is held back or on its way has been added."""
        if self.before_gradient is not None:
            self.before_gradient()
        self.finish_sending()
        return self._gradient

    def finish_sending(self) -> None:
        """Wait until every gradient that :meth:`accumulate` was given has been added."""
        if self._traffic is not None:
            self._traffic.gradients.drain()

    def room_for_gradients(self, *shape: int) -> Tensor:
        """An empty float32 tensor on the host, for :meth:`accumulate` to take over."""
        return self._gradient.memory.empty(*shape)

    def gradient(self) -> RowGradient | None:
        """What has been accumulated since the last :meth:`clear_gradient`, without rows that the device owns; ``None``
        if nothing."""
        return self._arrived().sum()

    def squared_gradient_norm(self) -> float:
        """Of what has been accumulated, on the device too; 0 if nothing, NaN if any of it is.

        Raises:
            NonFiniteRowsError: if the device's last update of its own rows has made some of them so.
        """
        there = self.hot.squared_gradient_norm(self) if self.hot is not None else 0.0
        return there + self._arrived().squared_norm()

    def replace_gradient(self, rows: Tensor, grad: Tensor) -> None:
        """Put what all ranks have accumulated for this rank's rows in the place of what this rank has accumulated.

        Args:
            rows: [n] int64, no two equal; there may be none. grad: [n, d] float32.
        """
        self._arrived().clear()
        self._gradient.add(rows, grad)

    def clear_gradient(self) -> None:
        """Forget the accumulated gradient; of rows that the device owns, of keys and values both."""
        self._arrived().clear()
        if self.hot is not None:
            self.hot.forget_gradients()

    # Updates

    def expect_update(self, wait: Wait | None) -> None:
        """Announce an update, as :meth:`Updates.expect` does."""
        self.updates.expect(wait)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Carry out an update that was announced. If it raises, the table is unreadable from then on."""
        with self.updates.writing(self._finish_reading):
            yield

    def _finish_reading(self) -> None:
        if self._on_device is not None:
            self._on_device.finish_reading()

    def own_on_device(self, hot: HotRows, owned: OwnedRows) -> None:
        """Let some rows be the device's own; only of a table that has a copy there or visits it."""
        self.hot = hot
        if isinstance(self._on_device, SlottedRows):
            self._on_device.owned = owned

    def settle(self) -> None:
        """Let whatever the device is told next come after all rows that are on their way to it."""
        self._on_device.settle()

    def changed_there(self, rows: Tensor, changed: Tensor, compute: Tensor) -> None:
        """Say that the device has updated rows of its own, before which :meth:`settle` was called.

        Args:
            rows: [n] int64, on the device; those that have ``changed`` [n] bool. compute: [n, d], their compute copies.
        """
        self._updated_there += 1
        self._on_device.changed_there(rows, changed, compute)

    @contextmanager
    def catching_up(self, rows: Tensor) -> Iterator[None]:
        """Write rows [n] int64 on the host as the device has updated them, which no reader there has to hear of.

        Raises:
            StaleRowsError, UpdateError: as :meth:`reading` does.
        """
        with self.reading():
            self._on_device.finish_reading()
            self.about_to_change(rows)
            yield

    def require_finite(self, infinite: int) -> None:
        """After an update that left so many rows infinite or NaN.

        Raises:
            NonFiniteRowsError: if there are any.
        """
        if infinite:
            raise NonFiniteRowsError(
                f"{infinite} rows of {self.name} left the range of {self.compute_dtype} in an update; "
                "resume from a checkpoint with a smaller learning rate"
            )

    # Memory

    def serve(self, device: torch.device) -> None:
        """Bring rows to another device from now on, where the model has been moved to; on the host they stay in place.

        Only for inference.
        """
        if device == self.device:
            return
        if isinstance(self._on_device, SlottedRows):
            self._on_device.close()
        self.device, self._traffic, self._on_device = device, None, None
        if self._needs_copy_on(device):
            self._on_device = self._resident_on(device)
            self._on_device.changed(slice(None), self._host.high)

    def _needs_copy_on(self, device: torch.device) -> bool:
        apart = device.type != "cpu" or self._traffic is not None
        return self.resident and (apart or self._resident_dtype != self.compute_dtype)

    def _resident_on(self, device: torch.device) -> ResidentRows:
        updates = self._traffic.updates if self._traffic is not None else None
        return ResidentRows(self.handle.shape, self._resident_dtype, device, updates)

    def host_bytes(self) -> int:
        """Bytes allocated on the host for the rows themselves (gradients in flight and optimizer state not counted);
        of what the ranks of a node share, this rank's part."""
        return self._host.nbytes() if self._host is not None else 0

    def share_of(self, plane: Tensor, shared: bool) -> int:
        """Bytes of a plane [r, …] that count as this rank's: of a ``shared`` one an equal part, else its own rows'."""
        return self._host.share_of(plane, shared)

    def device_bytes(self) -> int:
        """Bytes that the compute device needs at hand for rows that live there, or else, where device and host are one
        and so nothing is allocated, for the largest gather seen so far.
        """
        if isinstance(self._on_device, ResidentRows):
            return self._on_device.table.nbytes
        if self._on_device is not None:
            return 0  # slots are the pool's
        rows = self.rows if self.resident else self._largest_gather
        return rows * self.width * self.compute_dtype.itemsize

    def close(self) -> None:
        """Give the memory back; the table is not usable afterwards."""
        if isinstance(self._on_device, SlottedRows):
            self._on_device.close()
        self._host = self._on_device = self.read_current = self.before_gradient = self.shard = self.hot = None
        self._gradient.clear()

    def __deepcopy__(self, memo: dict) -> PartiallyOffloadedTensor:
        raise RuntimeError(
            f"{self.name} cannot be deep-copied: two models would train two diverging tables; build the second model "
            "afresh and load the adapter into it"
        )
