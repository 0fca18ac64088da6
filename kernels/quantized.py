"""Rows in 8 bits with a scale each: half of what bf16 takes, and all that routing has to read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 127


@dataclass(frozen=True)
class QuantizedRows:
    """A table [r, d]; where it is read like a tensor, as float32."""

    codes: Tensor
    """[r, d] int8, −127 to 127."""
    scales: Tensor
    """[r] float32; a row is its codes times its scale."""

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device | str) -> QuantizedRows:
        """Of a table [r, d]."""
        return cls(torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape[0], device=device))

    def put(self, rows: Tensor | slice, source: Tensor) -> None:
        """Set some rows [n] from ``source`` [n, d] of any float dtype: the largest element of a row becomes 127, others
        are rounded to nearest, and a row that is not finite becomes NaN."""
        source = source.float()
        scales = source.abs().amax(1) / _MOST
        codes = (source / torch.where(scales > 0, scales, 1)[:, None]).nan_to_num(0.0).round().clamp(-_MOST, _MOST)
        self.codes[rows] = codes.to(torch.int8)
        self.scales[rows] = torch.where(scales.isfinite(), scales, torch.nan)

    @property
    def shape(self) -> torch.Size:
        """[r, d]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, rows: slice) -> Tensor:
        """[n, d] float32: consecutive rows."""
        return self.codes[rows].float() * self.scales[rows, None]

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """[n, d] float32, as tensors have it; ``dim`` is 0."""
        return self.codes.index_select(dim, rows).float() * self.scales.index_select(0, rows)[:, None]

    def float(self) -> Tensor:
        """[r, d] float32: all of it."""
        return self[:]
