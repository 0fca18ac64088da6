"""How many rows are touched, by what, and whether two wordings of a fact touch the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import meft_engine
from learning.corpus import Batch, Corpus
from meft_kernels.dispatch import Selection

CAPS = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Caps, as shares of the rows, for which the kept mass is computed."""
WINDOW = 4
"""Micro-batches of an accumulation window."""
_FACTS_COMPARED = 64


class Touched:
    """Counts what an engine's adapters select."""

    def __init__(self, engine: meft_engine.MeftEngine) -> None:
        self._engine = engine
        self.adapters = list(engine.meft_adapters.adapters.values())
        self.rows = self.adapters[0].keys.rows
        self._before = [(0, 0, torch.zeros(2), 0.0)] * len(self.adapters)

    def since_last(self) -> dict[str, float]:
        """Of the training since this was last asked, means over layers: ``touched`` share of the rows by a
        micro-batch, ``kept_mass`` that the cap kept, share of ``dead_experts`` that no token chose."""
        touched, kept, dead = [], [], []
        for index, adapter in enumerate(self.adapters):
            stats = adapter.stats
            steps, rows, mass, load = self._before[index]
            self._before[index] = (stats.micro_batches, stats.active_rows, stats.mass, stats.load)
            touched.append((stats.active_rows - rows) / ((stats.micro_batches - steps) * self.rows))
            total, of_cap = (stats.mass - mass).tolist()
            kept.append(of_cap / total if total else 1.0)
            dead.append(float((stats.load - load == 0).double().mean()))
        mean = {"touched": touched, "kept_mass": kept, "dead_experts": dead}
        return {name: sum(values) / len(values) for name, values in mean.items()}

    @torch.no_grad()
    def over(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Without a cap: shares of the rows that a micro-batch touches and that a window of them touches, and the
        share of the activation that caps of various sizes would keep: what the rows of largest mass hold."""
        window = batches[:WINDOW]
        micro, union, kept = 0.0, 0.0, torch.zeros(len(CAPS), dtype=torch.float64)
        with self._selections() as seen:
            for batch in batches:
                self._engine.module.states(batch.hidden, batch.attention_mask)
        for selections in seen:
            masses = [mass_of_rows(*selection, self.rows) for selection in selections]
            micro += sum(float((mass > 0).double().mean()) for mass in masses) / len(masses)
            union += float((sum(masses[: len(window)]) > 0).double().mean())
            for mass in masses:
                held = mass.sort(descending=True).values.cumsum(0) / mass.sum().clamp(min=1e-12)
                kept += held[[max(1, int(cap * self.rows)) - 1 for cap in CAPS]] / len(masses)
        layers = len(self.adapters)
        return {
            "touched": micro / layers,
            "touched_window": union / layers,
            "kept_by_cap": {str(cap): float(share) / layers for cap, share in zip(CAPS, kept, strict=True)},
        }

    @torch.no_grad()
    def agreement(self, corpus: Corpus) -> dict[str, float]:
        """Overlap Σ min(p, q) of two wordings' activation over rows, at the token that the answer is read off.

        ``same_fact``: of two wordings of one fact. ``other_fact``: of one wording each of different facts. 1 is the
        same rows with the same weights, 0 none in common.
        """
        count = min(_FACTS_COMPARED, len(corpus.trained))
        wordings = []
        for passages in (corpus.trained, corpus.second_wording):
            batch = passages.batch(range(count))
            asking = (batch.labels[:, 1:] != -100).int().argmax(1)
            with self._selections() as seen:
                self._engine.module.states(batch.hidden, batch.attention_mask)
            wordings.append([self._at_tokens(*selections[0], batch, asking) for selections in seen])
        same = other = 0.0
        for first, second in zip(*wordings, strict=True):
            same += float(torch.minimum(first, second).sum(1).mean())
            other += float(torch.minimum(first, second.roll(1, 0)).sum(1).mean())
        return {"same_fact": same / len(self.adapters), "other_fact": other / len(self.adapters)}

    @torch.no_grad()
    def shared(self, corpus: Corpus) -> float:
        """Share of a text's activation that falls on rows which questions select too: where it can be disturbed."""
        masses = []
        for batch in (corpus.text.batch([0]), corpus.trained.batch(range(min(_FACTS_COMPARED, len(corpus.trained))))):
            with self._selections() as seen:
                self._engine.module.states(batch.hidden, batch.attention_mask)
            masses.append([mass_of_rows(*selections[0], self.rows) for selections in seen])
        shares = [
            float(text[facts > 0].sum() / text.sum().clamp(min=1e-12)) for text, facts in zip(*masses, strict=True)
        ]
        return sum(shares) / len(shares)

    @contextmanager
    def _selections(self) -> Iterator[list[list[tuple[Selection, Tensor]]]]:
        """In evaluation mode: for each adapter, the selections and activations of its forwards."""
        was_training = self._engine.module.training
        self._engine.eval()
        seen: list[list[tuple[Selection, Tensor]]] = [[] for _ in self.adapters]

        def listener(found: list[tuple[Selection, Tensor]]) -> Any:
            return lambda selection, activations, overflow: found.append((selection, activations))

        for adapter, found in zip(self.adapters, seen, strict=True):
            adapter.observers.append(listener(found))
        try:
            yield seen
        finally:
            for adapter in self.adapters:
                adapter.observers.pop()
            self._engine.train(was_training)

    def _at_tokens(self, selection: Selection, activations: Tensor, batch: Batch, tokens: Tensor) -> Tensor:
        """[B, r]: the share of each row in the activation of one token of each passage."""
        real = batch.attention_mask.bool()
        position = torch.full(real.shape, -1)
        position[real] = torch.arange(int(real.sum()))
        at = position[torch.arange(len(tokens)), tokens]
        weights = torch.where(selection.valid[at], activations[at], 0)
        found = torch.zeros(len(tokens), self.rows)
        found.scatter_add_(1, selection.active[selection.picks[at]], weights)
        return found / found.sum(1, keepdim=True).clamp(min=1e-12)


def mass_of_rows(selection: Selection, activations: Tensor, rows: int) -> Tensor:
    """[r] float64: total activation of each row."""
    valid = selection.valid
    mass = torch.zeros(rows, dtype=torch.float64)
    return mass.index_add_(0, selection.active[selection.picks[valid]], activations[valid].double())
