"""A table's rows on the host: two planes of 16 bits, or fp32 masters; and which of them are this process's."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_engine.offload.memory import host_zeros
from meft_engine.offload.shard import Shard
from meft_kernels import planes


class HostRows:
    """Rows [r, d] and nothing else: who may read or write them when is for the caller to see to.

    Args:
        name: what error messages call the table.
        shape: [r, d].
        compute_dtype: of the copy that the model reads: ``torch.bfloat16``, which is the masters' upper plane, or
            ``torch.float32``, which are the masters.
        trainable: keep the lower plane too.
        pin_memory, huge_pages: as :func:`host_zeros` has them.
        shard: what other ranks own; ``None``: all rows are this process's.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        compute_dtype: torch.dtype,
        *,
        trainable: bool,
        pin_memory: bool,
        huge_pages: bool,
        shard: Shard | None,
    ) -> None:
        self._name, self._compute_dtype, self._shard = name, compute_dtype, shard

        def allocate(dtype: torch.dtype, shared: bool) -> Tensor:
            if shard is not None and shared:
                return shard.allocate(shape, dtype, shard.fills)
            present = shard.owned if shard is not None else None
            return host_zeros(shape, dtype, pin_memory=pin_memory and shared, huge_pages=huge_pages, present=present)

        self.high: Tensor = allocate(compute_dtype, shared=True)
        """The compute copy: the upper plane, or the masters."""
        self.low: Tensor | None = None
        """The lower plane; rows that another rank owns have none."""
        if compute_dtype == torch.bfloat16 and trainable:
            self.low = allocate(torch.int16, shared=self._shares_low)

    @property
    def _shares_low(self) -> bool:
        return self._shard is None or self._shard.shares_state

    def masters(self, rows: slice) -> Tensor:
        """[n, d] float32, of consecutive rows; of those that another rank owns, the compute copy."""
        if self.low is None:
            return self.high[rows].float()
        return planes.join(self.high[rows], self.low[rows])

    def split(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """The compute copies of masters [n, d], and their lower planes where there are any.

        Raises:
            ValueError: for a finite number that is infinite in the compute copy.
        """
        source = source.to("cpu", torch.float32)
        if self._compute_dtype != torch.bfloat16:
            return source, None
        compute, low = planes.split(source)
        beyond = compute.isinf() & source.isfinite()
        if bool(beyond.any()):
            most = float(source[beyond].abs().max())
            raise ValueError(f"{self._name} is given {most:g}, which is beyond the range of bf16")
        return compute, low

    def put(self, rows: Tensor | slice, compute: Tensor, low: Tensor | None) -> None:
        """Set rows that are this rank's to write: their compute copies, and lower planes where they are kept here."""
        self.high[rows] = compute
        if self.low is None:
            return
        if self._shares_low:
            self.low[rows] = low
        elif isinstance(rows, slice):
            if self._shard.owned.start <= rows.start < rows.stop <= self._shard.owned.stop:
                self.low[rows] = low
        else:
            mine = self._shard.is_owned(rows)
            self.low[rows[mine]] = low[mine]

    def nbytes(self) -> int:
        """Bytes allocated; of what the ranks of a node share, this rank's part."""
        parts = ((self.high, True), (self.low, self._shares_low))
        return sum(self.share_of(plane, shared) for plane, shared in parts if plane is not None)

    def share_of(self, plane: Tensor, shared: bool) -> int:
        """Bytes of a plane [r, …] that count as this rank's: of a ``shared`` one an equal part, else its own rows'."""
        if self._shard is None:
            return plane.nbytes
        return plane.nbytes // self._shard.ranks_of_node if shared else plane[self._shard.owned].nbytes
