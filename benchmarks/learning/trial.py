"""What one trial is: a method, its settings, and how long it learns what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SECTIONS = ("adapter", "router", "active_rows", "optimizer", "variant")


@dataclass(frozen=True)
class Trial:
    """Settings of one trial; equal settings have equal keys."""

    method: str
    """``meft``, ``lora`` or ``dense``."""
    facts: int = 400
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 2e-2
    weight_decay: float = 0.0
    seed: int = 0
    """Of the order of the facts and of whatever the method draws."""
    rank: int = 0
    """Of LoRA."""
    rows: int = 0
    """Of the dense adapter; MEFT's are in ``adapter``."""
    adapter: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    active_rows: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    variant: dict[str, Any] = field(default_factory=dict)
    """What is tried that no configuration offers, see ``variants.py``."""

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def block(self) -> dict[str, Any]:
        """The ``"meft"`` block of the DeepSpeed configuration."""
        return {
            "adapter": {**self.adapter, "seed": self.seed},
            "router": self.router,
            "active_rows": self.active_rows,
            # As in every bf16 run: masters in fp32, and what goes to the device in half as many bytes.
            "offload": {"compute_dtype": "bf16"},
            # A trial has one core, on which nothing can be overlapped.
            "optimizer": {"overlap": False, **self.optimizer},
            "monitor": {"max_dead_experts": 1.0, "min_kept_mass": 0.0},
        }

    @property
    def key(self) -> str:
        """A digest of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def settings(self) -> str:
        """What differs from the defaults, such as ``top_k = 64, cap = 800``."""
        parts = [f"rank = {self.rank}"] if self.rank else []
        parts += [f"rows = {self.rows}"] if self.rows else []
        parts += [f"weight_decay = {self.weight_decay:g}"] if self.weight_decay else []
        for section in SECTIONS:
            for name, value in getattr(self, section).items():
                ambiguous = name in ("lr_scale",)
                parts.append(f"{section + '.' if ambiguous else ''}{name} = {value}")
        return ", ".join(parts) or "defaults"

    def but(self, **changes: Any) -> Trial:
        """The same trial with some settings changed; sections of the block are merged."""
        merged = {name: {**getattr(self, name), **value} for name, value in changes.items() if name in SECTIONS}
        return replace(self, **{**changes, **merged})
