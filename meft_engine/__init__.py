"""Fine-tune adapters far larger than the GPU: sparse adapter rows in host memory, driven by a DeepSpeed JSON.

Importing this package needs neither DeepSpeed nor Triton; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from meft_engine import after_import

__version__ = "0.1.0"

_MODULE_OF = {
    "initialize": "meft_engine.entry",
    "enable": "meft_engine.entry",
    "disable": "meft_engine.entry",
    "MeftEngine": "meft_engine.engine",
    "MeftConfig": "meft_engine.config",
    "MeftConfigError": "meft_engine.config",
    "ActiveRowsOverflow": "meft_engine.adapter.routing",
    "SparseCPUAdam": "meft_engine.optim.sparse_adam",
    "PartiallyOffloadedTensor": "meft_engine.offload.tensor",
    "load_adapter": "meft_engine.inference",
    **dict.fromkeys(
        (
            "adapter_names",
            "active_adapter",
            "set_adapter",
            "disable_adapter",
            "disable_adapter_layers",
            "enable_adapter_layers",
            "unload_adapter",
        ),
        "meft_engine.adapter.named",
    ),
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


# PEFT learns of MEFT when both are there, whichever comes first; importing it here would take seconds.
after_import.run("peft", "meft_engine.peft")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
