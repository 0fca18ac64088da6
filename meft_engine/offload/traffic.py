"""What goes to and from one device, for all tables whose rows visit it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from meft_engine.config import OffloadConfig
from meft_engine.offload.copies import Copies, copies_beside
from meft_engine.offload.returning import GradientReturn
from meft_engine.offload.slots import SlotPool
from meft_engine.offload.staging import StagedRows


@dataclass(frozen=True)
class Traffic:
    """Rows on their way there, and gradients on their way back."""

    rows: StagedRows
    """That the model's thread asks for."""
    updates: StagedRows
    """That the thread which updates rows sends."""
    slots: SlotPool
    """Where values are while they visit."""
    key_slots: SlotPool
    """Where keys are, which the same layer needs at the same time, if they do not live there."""
    gradients: GradientReturn

    @classmethod
    def of(cls, device: torch.device, config: OffloadConfig) -> Traffic | None:
        """For a model that computes on ``device``; ``None`` where nothing has to be copied."""
        copies = copies_beside(device)
        return cls.by(copies, config) if copies is not None else None

    @classmethod
    def by(cls, copies: Copies, config: OffloadConfig) -> Traffic:
        """Whose copies ``copies`` makes."""
        rows, updates = (
            StagedRows(copies, pin_memory=config.pin_memory, huge_pages=config.huge_pages) for _ in range(2)
        )
        budget = config.slot_bytes
        if budget is not None and config.keys == "host":
            budget //= 2
        slots, key_slots = (SlotPool(copies, rows, budget) for _ in range(2))
        return cls(rows, updates, slots, key_slots, GradientReturn(copies))

    def of_keys(self) -> Traffic:
        """The same, with the slots for keys."""
        return replace(self, slots=self.key_slots)

    def device_bytes(self) -> dict[str, int]:
        """What is allocated there for it, by kind: ``slots``, and the most that ``gradients`` on their way can take."""
        return {
            "slots": self.slots.bytes() + self.key_slots.bytes(),
            "gradients": self.gradients.most_bytes(),
        }
