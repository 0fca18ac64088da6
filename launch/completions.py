"""Prompt/completion examples: reading them, turning them into token ids, and batching them.

The loss is on the completion only. Prompts are given at inference and need not be learned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out of the loss."""


def load_examples(path: str, prompt_column: str = "prompt", completion_column: str = "completion") -> Dataset:
    """Read a file of JSON lines and keep its two columns, named ``prompt`` and ``completion``.

    Raises:
        ValueError: one sentence, for a file that is missing, empty or not JSON lines, for columns that are missing or
            hold no text, and for an example without a prompt or a completion.
    """
    import datasets

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data file {path!r} does not exist; give the path of a file of JSON lines")
    if not file.read_bytes().strip():
        raise ValueError(f"data file {path!r} is empty; it needs at least one line with a prompt and a completion")
    try:
        data = datasets.load_dataset("json", data_files=str(file), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"data file {path!r} is not JSON lines ({cause}); write one JSON object a line") from error
    for column, flag in ((prompt_column, "--prompt_column"), (completion_column, "--completion_column")):
        if column not in data.column_names:
            raise ValueError(
                f"data file {path!r} has no column {column!r} (it has {', '.join(map(repr, data.column_names))}); "
                f"rename one in the file or name it with {flag}"
            )
        kind = getattr(data.features[column], "dtype", "nested values")
        if kind not in {"string", "large_string"}:
            raise ValueError(
                f"column {column!r} of data file {path!r} holds {kind} where text is needed; write its values as "
                "JSON strings"
            )
        for number, text in enumerate(data[column], start=1):
            if not (text and text.strip()):
                raise ValueError(
                    f"example {number} of data file {path!r} has no {column!r}; fill it in or remove the line"
                )
    data = data.select_columns([prompt_column, completion_column])
    return data.rename_columns({prompt_column: "prompt", completion_column: "completion"})


def tokenize(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "the data") -> Dataset:
    """Token ids and labels of every example that fits into ``max_length`` tokens.

    A longer example is dropped, not cut: its answer would lose its end, or its question its beginning, and the model
    would learn something that nobody wrote. How many were dropped is logged.

    Raises:
        ValueError: when no example fits.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so that an answer could not end; set its eos_token"
        )
    encoded = examples.map(
        lambda example: encode(example["prompt"], example["completion"], tokenizer),
        remove_columns=examples.column_names,
        desc=f"Tokenizing {name}",
    )
    longest = max(len(ids) for ids in encoded["input_ids"])
    fitting = encoded.filter(lambda example: len(example["input_ids"]) <= max_length)
    dropped = len(encoded) - len(fitting)
    if not len(fitting):
        raise ValueError(
            f"max_length = {max_length} is shorter than every example of {name} (the longest has {longest} tokens); "
            f"use --max_length {longest} to keep all"
        )
    if dropped:
        logger.warning(
            "%d of %d examples of %s are longer than max_length = %d tokens and were dropped (the longest has %d)",
            dropped, len(encoded), name, max_length, longest,
        )  # fmt: skip
    return fitting


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of one example, closed by the end-of-sequence token.

    The two texts are tokenised apart, so that a prompt has the same tokens here and at inference.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORED] * len(prompt_ids) + completion_ids}


@dataclass
class CompletionCollator:
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
