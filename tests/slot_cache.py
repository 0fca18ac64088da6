"""A plain model of rows in slots: what :func:`meft_kernels.slots.gather` must do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Cache:
    """A cache of S slots, by dictionaries."""

    slots: int
    owned: frozenset[int] = frozenset()
    """Rows that come from the device itself."""
    slot_of: dict[int, int] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)
    version: dict[int, int] = field(default_factory=dict)
    now: int = 0

    def ask(self, rows: list[int], versions: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Slots of the rows, whether each is copied and from where, and the five counts."""
        self.now += 1
        there = [row in self.slot_of for row in rows]
        stale = [known and self.version[row] != versions[row] for row, known in zip(rows, there, strict=True)]
        for row, known in zip(rows, there, strict=True):
            if known:
                self.used[self.slot_of[row]] = self.now
        held = {slot: row for row, slot in self.slot_of.items()}
        candidates = [slot for slot in range(self.slots) if slot not in held or self.used[slot] != self.now]
        candidates.sort(key=lambda slot: (slot in held, self.used.get(slot, 0), slot))
        missing = there.count(False)
        victims = sorted(candidates[:missing])
        for slot in victims:
            if slot in held:
                del self.slot_of[held[slot]]
        found, copied = [], []
        for row, known, old in zip(rows, there, stale, strict=True):
            if not known and victims:
                self.slot_of[row] = victims.pop(0)
                self.used[self.slot_of[row]] = self.now
                known, old = True, True
            found.append(self.slot_of[row] if known else -1)
            copied.append(int(old))
            self.version[row] = versions[row]
        unplaced = found.count(-1)
        copied = [2 if one and row in self.owned else one for row, one in zip(rows, copied, strict=True)]
        counts = [len(rows) - missing - sum(stale), missing, sum(stale), unplaced, copied.count(2)]
        return found, copied, counts
