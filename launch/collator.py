"""Batches of token ids: padding, and what of it the loss leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out of the loss."""


@dataclass
class Collator:
    """Pads a batch on the right to its own longest example.

    What is padding follows from the lengths, not from the token: many tokenizers pad with the end-of-sequence token,
    which must stay in the loss where an answer ends.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest]."""
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

        input_ids = [list(example["input_ids"]) for example in examples]
        return {
            "input_ids": padded(input_ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in input_ids], 0),
            "labels": padded([list(example["labels"]) for example in examples], IGNORED),
        }
