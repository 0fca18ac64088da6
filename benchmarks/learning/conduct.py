"""Conducts one trial: build, train, examine."""

from __future__ import annotations

import math
import random
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_linear_schedule_with_warmup, set_seed

from learning import corpus, methods, variants
from learning.corpus import Corpus, Passages
from learning.sparsity import Touched
from learning.top_layers import TopLayers
from learning.trial import Trial

_WARMUP_STEPS = 8
_EXAMINED_AT_ONCE = 64


def conduct(trial: Trial, corpus_file: Path, model: str, first_layer: int) -> dict[str, Any]:
    """Train and examine; the result holds numbers, and lists and dictionaries of numbers."""
    data = _loaded(corpus_file)
    set_seed(trial.seed)
    network = TopLayers(model, first_layer)
    steps = trial.epochs * math.ceil(len(data.trained) / trial.batch_size)
    engine = methods.build(
        trial, network, lambda optimizer: get_linear_schedule_with_warmup(optimizer, _WARMUP_STEPS, steps)
    )
    touched = None
    if trial.method == "meft":
        variants.apply(trial.variant, engine, trial.seed)
        touched = Touched(engine)

    found = _train(trial, engine, data, touched)
    engine.eval()
    for split in ("trained", "second_wording"):
        found |= {f"{split}_{name}": value for name, value in examine(network, getattr(data, split)).items()}
    found["perplexity_before"] = _perplexity_before(corpus_file, model, first_layer)
    found["perplexity_after"] = perplexity(network, data.text)
    if touched is not None:
        found |= {f"text_{name}": value for name, value in touched.over(list(data.text.batches(1))).items()}
        found |= touched.agreement(data)
        found["text_shared"] = touched.shared(data)
    found["device_bytes"] = methods.device_bytes(engine)
    engine.destroy()
    return found


def _train(trial: Trial, engine: Any, data: Corpus, touched: Touched | None) -> dict[str, Any]:
    draws = random.Random(trial.seed)
    losses: list[float] = []
    seconds: list[float] = []
    epochs: list[dict[str, Any]] = []
    engine.train()
    for _ in range(trial.epochs):
        order = list(range(len(data.trained)))
        draws.shuffle(order)
        for batch in data.trained.batches(trial.batch_size, order):
            start = time.perf_counter()
            loss = engine(batch.hidden, batch.attention_mask, batch.labels)
            engine.backward(loss)
            engine.step()
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss.detach()))
            # Only now: the first step measures what routing needs to know.
            if touched is not None and len(losses) == 1:
                start_text = {**touched.over([data.text.batch([0])]), "shared": touched.shared(data)}
        if touched is not None:
            epochs.append(touched.since_last())
    tail = losses[-math.ceil(len(losses) / trial.epochs) :]
    found = {
        "losses": [round(loss, 4) for loss in losses],
        "loss": sum(tail) / len(tail),
        "seconds": sum(seconds),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
    }
    if touched is not None:
        found |= {f"start_text_{name}": value for name, value in start_text.items()}
        found |= {f"{name}_by_epoch": [epoch[name] for epoch in epochs] for name in epochs[0]}
    return found


@torch.no_grad()
def examine(network: TopLayers, passages: Passages) -> dict[str, float]:
    """Share of the passages whose learned tokens are all predicted, and the mean loss of these tokens.

    The model answers greedily with exactly the tokens of the answer and its end if and only if each of them is the
    likeliest after those before it, so one forward tells what generation would.
    """
    right, loss, count = 0, 0.0, 0
    for batch in passages.batches(_EXAMINED_AT_ONCE):
        logits, targets, owners = network.predictions(batch.hidden, batch.attention_mask, batch.labels)
        wrong = owners[logits.argmax(-1) != targets]
        right += batch.labels.shape[0] - wrong.unique().numel()
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += targets.numel()
    return {"exact_match": right / len(passages), "loss": loss / count}


@torch.no_grad()
def perplexity(network: TopLayers, passages: Passages) -> float:
    """Of every token but the first of each passage."""
    total, count = 0.0, 0
    for batch in passages.batches(1):
        logits, targets, _ = network.predictions(batch.hidden, batch.attention_mask, batch.labels)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += targets.numel()
    return math.exp(total / count)


@lru_cache(maxsize=1)
def _loaded(corpus_file: Path) -> Corpus:
    return corpus.load(corpus_file)


@lru_cache(maxsize=1)
def _perplexity_before(corpus_file: Path, model: str, first_layer: int) -> float:
    return perplexity(TopLayers(model, first_layer).eval(), _loaded(corpus_file).text)
