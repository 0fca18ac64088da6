"""What several ranks train in the tests, and with which data."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_engine.adapter.attach import attach
from meft_engine.config import MeftConfig
from tests.families import VOCAB, tiny_block, tiny_llama
from tests.integration.engines import ds_config

SEQUENCES, LENGTH = 2, 10
"""Of a rank's micro-batch."""

ADAM = {"lr": 2e-3, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1}


@dataclass
class Case:
    """One run: how it is configured, and which rows its ranks touch."""

    name: str
    touched: str = "overlapping"
    """``overlapping``: each rank has sentences of its own. ``equal``: all have the same. ``disjoint``: no row is
    touched by two ranks. ``empty``: all but the first rank have padding alone. ``idle``: nobody touches rows of another
    owner than rank 0."""
    stage: int = 0
    mode: str = "lazy"
    overlap: bool = True
    steps: int = 50
    accumulation: int = 1
    nodes: list[list[int]] | None = None
    """Which ranks share a node; ``None``: all."""
    bf16: bool = False
    sequence: int = 1
    """How many ranks share a sequence, for DeepSpeed; here each has one of its own all the same."""
    small_messages: bool = False
    """Whether gradients and rows travel in many small messages."""
    adapter: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    top_level: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The DeepSpeed configuration."""
        shape = {"rows": 120, "num_experts": 12, **self.adapter}
        if self.touched in ("disjoint", "idle"):
            # What a first layer routes does not change while its router does not.
            shape |= {"gate": "none", "layers_to_transform": [0]}
        optimizer = {"mode": self.mode, "overlap": self.overlap, **self.sections.get("optimizer", {})}
        sections = {"communication": {"timeout": 60.0}, **self.sections, "optimizer": optimizer}
        return ds_config(
            tiny_block(shape, **sections),
            stage=self.stage,
            bf16=self.bf16,
            clip=0.5,
            gas=self.accumulation,
            adam={**ADAM, "torch_adam": True},
            **{"train_micro_batch_size_per_gpu": SEQUENCES, **self.top_level},
        )

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


def model() -> torch.nn.Module:
    """The base that every case starts from."""
    return tiny_llama(num_hidden_layers=2)


def sentences(case: Case, step: int, micro_step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [SEQUENCES, LENGTH] of one rank in one micro-step."""
    seed = (step % 7) * 1000 + micro_step * 100 + (0 if case.touched == "equal" else rank)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if case.touched in ("disjoint", "idle"):
        # A sentence of one word gives the same input at all its places, and so one choice of experts.
        words = torch.tensor(_words_apart(ranks)[rank] if case.touched == "disjoint" else _words_of_rank_0(ranks))
        ids = words[torch.randint(0, len(words), (SEQUENCES, 1), generator=generator)].expand(-1, LENGTH).contiguous()
    if case.touched == "empty" and rank:
        mask.zero_()
    return ids, mask


def loss_of(engine: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy over the real tokens, divided by the number of all tokens, which is the same on all ranks."""
    logits = engine(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * mask[:, 1:].flatten()).sum() / mask[:, 1:].numel()


@functools.cache
def _experts_of_words() -> dict[int, frozenset[int]]:
    """Of every word, the experts that it chooses in the first layer."""
    base = model().eval()
    block = MeftConfig.from_block(Case("", touched="disjoint").config()["meft"])
    adapter = next(iter(attach(base, block, compute_dtype=torch.float32).adapters.values()))
    seen: list[Tensor] = []
    adapter.observers.append(lambda selection, *_: seen.append(selection.experts))
    with torch.no_grad():
        for word in range(3, VOCAB):
            base(input_ids=torch.full((1, 2), word), use_cache=False)
    return {word: frozenset(experts.flatten().tolist()) for word, experts in zip(range(3, VOCAB), seen, strict=True)}


@functools.cache
def _words_apart(ranks: int) -> list[list[int]]:
    """For each rank a few words whose experts in the first layer no other rank's words have."""
    experts_of = _experts_of_words()
    groups: list[list[int]] = []
    taken: set[int] = set()
    for word, experts in experts_of.items():
        if len(groups) < ranks and not experts & taken:
            taken |= experts
            groups.append([word, *(w for w, e in experts_of.items() if e == experts and w != word)][:3])
    assert len(groups) == ranks, "too few words choose experts of their own"
    return groups


@functools.cache
def _words_of_rank_0(ranks: int) -> list[int]:
    """Words that choose experts of rank 0 alone in the first layer."""
    found = [word for word, experts in _experts_of_words().items() if max(experts) < 12 // ranks]
    assert found, "no word chooses experts of rank 0 alone"
    return found
