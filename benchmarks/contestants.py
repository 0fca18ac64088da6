"""The optimizers that are compared, each with one table of the same size."""

from __future__ import annotations

import mmap

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam, run_now

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01

# An element's gradient is read; its master and two moments are read and written. A master of ours is two planes of two
# bytes, which comes to the same.
BYTES_PER_ELEMENT = 4 + 2 * (4 + 4 + 4)
BYTES_PER_ELEMENT_BF16_MOMENTS = 4 + 2 * (4 + 2 + 2)


class Ours:
    """`SparseCPUAdam`, lazy, over a table whose masters are two planes and whose compute copy is bf16."""

    def __init__(self, rows: int, width: int, threads: int, moments_dtype: torch.dtype = torch.float32) -> None:
        self.table = PartiallyOffloadedTensor(
            "table",
            rows,
            width,
            device=torch.device("cpu"),
            compute_dtype=torch.bfloat16,
            resident=False,
            threads=threads,
        )
        self.optimizer = SparseCPUAdam(
            [self.table], LR, BETAS, EPS, WEIGHT_DECAY, mode="lazy", moments_dtype=moments_dtype, threads=threads
        )

    def touch(self) -> None:
        """Read a number of every page of the table and its moments.

        Systems that balance memory between NUMA nodes, such as hosts of virtual machines, unmap pages from time to time
        to learn who uses them, and the next visit pays a microsecond or two for each. Dense steps visit every page all
        the time and hardly feel it; a step that visits rows for the first time in a while would pay for all of them.
        """
        for tensor in (*self.table.planes(), *self.optimizer.state[self.table.handle].values()):
            step = max(1, mmap.PAGESIZE // (tensor.itemsize * tensor.stride(-1)))
            tensor[..., ::step].sum()

    def prepare(self, rows: Tensor, grad: Tensor) -> None:
        """Hand over the gradient [n, d] of ``rows``, unsorted, as a window of several micro-steps leaves them."""
        self.optimizer.zero_grad()
        self.table.accumulate(rows, grad)

    def prepare_all(self, grad: Tensor) -> None:
        """Hand over a gradient [r, d] of all rows, in random order."""
        self.prepare(torch.randperm(self.table.rows), grad)

    def step(self) -> None:
        """Update the rows that have a gradient, as the engine does."""
        run_now(self.optimizer.updates())

    def host_bytes(self) -> int:
        """Of the table and its moments."""
        return self.table.host_bytes() + self.optimizer.host_bytes()

    def close(self) -> None:
        """Give the memory back."""
        self.optimizer.close()


class DenseDeepSpeed:
    """`DeepSpeedCPUAdam`, which steps the whole table: fp32 master, moments and gradient."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = torch.nn.Parameter(start.clone())
        self.optimizer = DeepSpeedCPUAdam([self.parameter], LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    def prepare_all(self, grad: Tensor) -> None:
        """Hand over the gradient [r, d]."""
        self.parameter.grad = grad

    def step(self) -> None:
        """Update every row."""
        self.optimizer.step()


class TorchSparse:
    """`torch.optim.SparseAdam`, which has no weight decay and no bias correction of a row's own."""

    def __init__(self, start: Tensor) -> None:
        self.parameter = torch.nn.Parameter(start.clone())
        self.optimizer = torch.optim.SparseAdam([self.parameter], LR, betas=BETAS, eps=EPS)

    def prepare(self, rows: Tensor, grad: Tensor) -> None:
        """Hand over the same gradient as a sparse tensor, coalesced beforehand."""
        shape = self.parameter.shape
        self.parameter.grad = torch.sparse_coo_tensor(rows[None], grad, shape, check_invariants=False).coalesce()

    def prepare_all(self, grad: Tensor) -> None:
        """Hand over a gradient [r, d] of all rows."""
        self.prepare(torch.randperm(grad.shape[0]), grad)

    def step(self) -> None:
        """Update the rows of the gradient."""
        self.optimizer.step()
