"""safetensors files: opened in one sentence or not at all, and written piece by piece.

safetensors' own writer wants all tensors at hand at once; rows that are brought to date, converted or taken from a
running training are made a few at a time, and what that takes in memory is one piece.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meft_engine.config import MeftConfigError

# https://github.com/huggingface/safetensors#format: names of the types that are written here.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Described:
    """A tensor that is yet to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """How much room it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """What a finished file is known by."""

    bytes: int
    sha256: str


class SafetensorsStream:
    """A safetensors file that is written from its first to its last tensor; a context manager.

    Args:
        path: of the file, which must not exist. tensors: what will come, in this order, by name.
        metadata: of the header.

    Raises:
        FileExistsError: if there is such a file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Described], metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, described in tensors.items():
            start, end = end, end + described.nbytes
            header[name] = {
                "dtype": TYPES[described.dtype],
                "shape": list(described.shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
        self._digest = hashlib.sha256()
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="meft-sum")
        self._left = end
        self._size = 0
        self._file = path.open("xb")
        self._put(len(encoded).to_bytes(8, "little"))
        self._put(encoded)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._summing.shutdown()
        self._file.close()

    def write(self, piece: Tensor) -> None:
        """The next rows of the tensor that is due, or all of it; on any device."""
        raw = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if raw.nbytes > self._left:
            raise ValueError(f"{self._file.name}: more is written than was described")
        self._left -= raw.nbytes
        self._put(memoryview(raw))

    def finish(self) -> WrittenFile:
        """Bring everything to the disk.

        Raises:
            ValueError: if tensors that were described have not come.
        """
        if self._left:
            raise ValueError(f"{self._file.name}: {self._left} bytes of what was described are missing")
        self._file.flush()
        os.fsync(self._file.fileno())
        return WrittenFile(self._size, self._digest.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        self._size += len(data)
        # Both take about as long, and neither holds the interpreter.
        summed = self._summing.submit(self._digest.update, data)
        self._file.write(data)
        summed.result()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> WrittenFile:
    """Write a file of tensors that are at hand, and bring it to the disk."""
    described = {name: Described(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsStream(path, described, metadata) as stream:
        for tensor in tensors.values():
            stream.write(tensor)
        return stream.finish()


def open_safetensors(path: Path) -> Any:
    """The file, memory-mapped; a context manager, as ``safetensors.safe_open`` has it.

    Raises:
        FileNotFoundError: if it is missing.
        MeftConfigError: if it is no safetensors file, or its header says what is not true of it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so nothing can be loaded from {path.parent}")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise MeftConfigError(f"{path} is not a whole safetensors file ({error}); load another checkpoint") from None
