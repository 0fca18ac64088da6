"""Fine-tune adapters far larger than the GPU: sparse adapter rows in host memory, driven by a DeepSpeed JSON.

Importing this package needs neither DeepSpeed nor Triton; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "initialize": "meft_engine.entry",
    "enable": "meft_engine.entry",
    "disable": "meft_engine.entry",
    "MeftEngine": "meft_engine.engine",
    "MeftConfig": "meft_engine.config",
    "MeftConfigError": "meft_engine.config",
    "ActiveRowsOverflow": "meft_engine.adapter.routing",
    "SparseCPUAdam": "meft_engine.optim.sparse_adam",
    "PartiallyOffloadedTensor": "meft_engine.offload.tensor",
    "load_adapter": "meft_engine.checkpoint.adapter_files",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from meft_engine.adapter.routing import ActiveRowsOverflow
    from meft_engine.checkpoint.adapter_files import load_adapter
    from meft_engine.config import MeftConfig, MeftConfigError
    from meft_engine.engine import MeftEngine
    from meft_engine.entry import disable, enable, initialize
    from meft_engine.offload.tensor import PartiallyOffloadedTensor
    from meft_engine.optim.sparse_adam import SparseCPUAdam


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
