"""The facts and the fixed text as tokens, with what the frozen lower layers make of them computed once.

Everything below the first adapted layer is the same in every step of every trial, so a trial starts from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import airportsdata
import torch
from collator import IGNORED
from facts import FIRST_WORDING, SECOND_WORDING, choose_facts
from formats import encode_pair
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TEXT = Path(__file__).with_name("text.txt")
TEXT_BLOCK = 512
"""Tokens of a block of the fixed text."""
_SPLITS = ("trained", "second_wording", "text")
_FACTS_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Some passages, padded on the right."""

    hidden: Tensor
    """[B, S, d] float32: input of the first adapted layer."""
    attention_mask: Tensor
    """[B, S] int64: 0 at padding."""
    labels: Tensor
    """[B, S] int64: the token itself where it is learned, else -100."""


@dataclass(frozen=True)
class Passages:
    """One split: passages of different lengths, end to end."""

    hidden: Tensor
    labels: Tensor
    ends: list[int]

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The passages of these indices, padded to the longest of them."""
        spans = [(self.ends[i - 1] if i else 0, self.ends[i]) for i in indices]
        longest = max(end - start for start, end in spans)
        hidden = torch.zeros(len(spans), longest, self.hidden.shape[1])
        mask = torch.zeros(len(spans), longest, dtype=torch.int64)
        labels = torch.full((len(spans), longest), IGNORED)
        for row, (start, end) in enumerate(spans):
            hidden[row, : end - start] = self.hidden[start:end]
            labels[row, : end - start] = self.labels[start:end]
            mask[row, : end - start] = 1
        return Batch(hidden, mask, labels)

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """All passages, ``size`` at a time; by ``order``, else as they stand."""
        order = range(len(self)) if order is None else order
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


@dataclass(frozen=True)
class Corpus:
    """What a trial learns and is examined with.

    ``trained`` are the questions that are learned, with their answers; ``second_wording`` asks for the same in other
    words, and is never trained on; ``text`` is running prose, in blocks of :data:`TEXT_BLOCK` tokens.
    """

    trained: Passages
    second_wording: Passages
    text: Passages


def build(model: str, facts: int, first_layer: int, folder: Path) -> Path:
    """Compute the corpus unless ``folder`` has it already, and give its file."""
    settings = [model, facts, first_layer, FIRST_WORDING, SECOND_WORDING, hashlib.sha256(TEXT.read_bytes()).hexdigest()]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = folder / f"corpus-{facts}-{digest}.safetensors"
    if path.is_file():
        return path
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    chosen = choose_facts(airportsdata.load("IATA").values(), facts, _FACTS_SEED)
    encoded = {
        "trained": _questions(chosen, FIRST_WORDING, tokenizer),
        "second_wording": _questions(chosen, SECOND_WORDING, tokenizer),
        "text": _blocks(tokenizer),
    }
    tensors = {}
    for split, passages in encoded.items():
        tensors |= {f"{split}.{name}": tensor for name, tensor in _through(base, first_layer, split, passages).items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
    return path


def load(path: Path) -> Corpus:
    """The corpus of a file that :func:`build` gave."""
    with safe_open(path, framework="pt") as file:
        parts = {
            split: Passages(
                file.get_tensor(f"{split}.hidden"),
                file.get_tensor(f"{split}.labels"),
                file.get_tensor(f"{split}.ends").tolist(),
            )
            for split in _SPLITS
        }
    return Corpus(**parts)


def _questions(facts: list[tuple[str, str]], wording: str, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    return [encode_pair(wording.format(code=code), f" {city}", tokenizer) for code, city in facts]


def _blocks(tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    blocks = [ids[start : start + TEXT_BLOCK] for start in range(0, len(ids) - TEXT_BLOCK + 1, TEXT_BLOCK)]
    return [{"input_ids": block, "labels": block} for block in blocks]


@torch.no_grad()
def _through(model: PreTrainedModel, first_layer: int, split: str, passages: list[dict]) -> dict[str, Tensor]:
    """Input of ``first_layer`` at every token of every passage."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hook = model.model.layers[first_layer].register_forward_pre_hook(keep)
    hidden = []
    for start in tqdm(range(0, len(passages), 32), desc=f"Frozen layers, {split}", unit="batch"):
        chunk = [torch.tensor(passage["input_ids"]) for passage in passages[start : start + 32]]
        ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(c) for c in chunk], batch_first=True)
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden += [state[: len(c)] for state, c in zip(seen.pop(), chunk, strict=True)]
    hook.remove()
    lengths = torch.tensor([len(passage["input_ids"]) for passage in passages])
    return {
        "hidden": torch.cat(hidden),
        "labels": torch.cat([torch.tensor(passage["labels"]) for passage in passages]),
        "ends": lengths.cumsum(0),
    }
