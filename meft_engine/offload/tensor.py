"""`PartiallyOffloadedTensor`: a large table whose rows live in host memory and visit the device a few at a time.

It is the one object that knows where the copies of a row are. Everyone else asks it for rows and gives it gradients.
It is deliberately no ``nn.Parameter`` and no module attribute that DeepSpeed or ``Module.to`` could find: it must
neither be flattened, cast, broadcast nor moved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from meft_engine.offload.memory import host_zeros


class StaleRowsError(RuntimeError):
    """Rows were read that an update has replaced since they were first read."""


class RowGradient(NamedTuple):
    """The gradient accumulated so far: ``rows`` [n] int64 ascending, ``grad`` [n, d] float32, both on the host."""

    rows: Tensor
    grad: Tensor


class PartiallyOffloadedTensor:
    """Rows [r, d]: the fp32 master on the host, and a compute copy that the model reads.

    On the CPU in fp32 the compute copy *is* the master; otherwise it is a second table, on the device where
    ``resident`` (keys, which routing needs there) and else on the host (values, gathered on demand).

    Args:
        name: what error messages call it, such as ``model.layers.0.mlp/keys``.
        rows: r. width: d.
        device: where the model computes.
        compute_dtype: precision of the compute copy, ``torch.float32`` or ``torch.bfloat16``.
        resident: keep the whole compute copy on ``device``.
        trainable: accept gradients; ``False`` for inference, where they are ignored.
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
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype
        self.resident = resident
        self.trainable = trainable
        self.version = 0
        self.master = host_zeros((rows, width), torch.float32)
        home = self.device if resident else torch.device("cpu")
        self._aliased = compute_dtype == torch.float32 and home.type == "cpu"
        if self._aliased:
            self._compute = self.master
        elif home.type == "cpu":
            self._compute = host_zeros((rows, width), compute_dtype)
        else:
            self._compute = torch.zeros(rows, width, dtype=compute_dtype, device=home)
        self._pending: RowGradient | None = None
        self._largest_gather = 0

    @property
    def rows(self) -> int:
        """Number of rows r."""
        return self.master.shape[0]

    @property
    def width(self) -> int:
        """Width d of a row."""
        return self.master.shape[1]

    def fill(self, source: Tensor) -> None:
        """Set all rows from ``source`` [r, d] (any float dtype, any device) and refresh the compute copy."""
        if source.shape != self.master.shape:
            raise ValueError(f"{self.name} holds {tuple(self.master.shape)}, not {tuple(source.shape)}")
        self.master.copy_(source)
        self.publish(slice(None))

    def compute_copy(self) -> Tensor:
        """The whole compute copy [r, d] on the device. Only for a resident tensor."""
        if not self.resident:
            raise RuntimeError(f"{self.name} is not resident on the device; gather the rows that are needed")
        return self._compute

    def gather(self, rows: Tensor, version: int | None = None) -> Tensor:
        """Bring rows to the device.

        Args:
            rows: [n] int64 ids, on any device.
            version: the version that the caller saw before; ``None`` accepts the present one.

        Returns:
            [n, d] float32 on ``device``, the exact values of the compute copy.

        Raises:
            StaleRowsError: if the rows have been updated since ``version``.
        """
        if version is not None:
            self.require_version(version)
        self._largest_gather = max(self._largest_gather, rows.numel())
        found = self._compute.index_select(0, rows.to(self._compute.device))
        return found.to(self.device).float()

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

    def accumulate(self, rows: Tensor, grad: Tensor) -> None:
        """Add the gradient of some rows. Rows not named get none; the sum follows the order of the calls.

        Args:
            rows: [n] int64, ascending, no two equal. grad: [n, d]; the tensor is taken over, not copied.
        """
        if not self.trainable or not rows.numel():
            return
        rows, grad = rows.to("cpu"), grad.to("cpu", torch.float32)
        if self._pending is None:
            self._pending = RowGradient(rows, grad)
        elif torch.equal(self._pending.rows, rows):
            self._pending.grad.add_(grad)
        else:
            union = torch.cat((self._pending.rows, rows)).unique()
            total = grad.new_zeros(union.numel(), self.width)
            total.index_copy_(0, torch.searchsorted(union, self._pending.rows), self._pending.grad)
            total.index_add_(0, torch.searchsorted(union, rows), grad)
            self._pending = RowGradient(union, total)

    def gradient(self) -> RowGradient | None:
        """What has been accumulated since the last :meth:`clear_gradient`; ``None`` if nothing."""
        return self._pending

    def clear_gradient(self) -> None:
        """Forget the accumulated gradient."""
        self._pending = None

    def publish(self, rows: Tensor | slice) -> None:
        """Make updated master rows visible to readers."""
        if not self._aliased:
            self._compute[rows] = self.master[rows].to(self._compute.device, self.compute_dtype)
        self.version += 1

    def host_bytes(self) -> int:
        """Bytes allocated on the host for the rows themselves (gradients in flight and optimizer state not counted)."""
        compute = self._compute.nbytes if not self._aliased and self._compute.device.type == "cpu" else 0
        return self.master.nbytes + compute

    def device_bytes(self) -> int:
        """Bytes that the compute device needs at hand: the resident copy, or the largest gather seen so far.

        On the CPU device and host are one: there this says what an accelerator would hold.
        """
        rows = self.rows if self.resident else self._largest_gather
        return rows * self.width * self.compute_dtype.itemsize

    def __deepcopy__(self, memo: dict) -> PartiallyOffloadedTensor:
        raise RuntimeError(
            f"{self.name} cannot be deep-copied: two models would train two diverging tables; build the second model "
            "afresh and load the adapter into it"
        )
