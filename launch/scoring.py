"""Scores of short answers, as SQuAD defines them: exact match and token F1 after normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, without punctuation and articles, words separated by one space."""
    text = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, truth: str) -> float:
    """1.0 where both are the same after normalisation, else 0.0."""
    return float(normalize(prediction) == normalize(truth))


def token_f1(prediction: str, truth: str) -> float:
    """The harmonic mean of word precision and recall; two empty answers agree."""
    predicted, true = normalize(prediction).split(), normalize(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def score(predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float | int]:
    """The means over a question set: ``exact_match``, ``f1`` and ``count``."""
    pairs = list(zip(predictions, truths, strict=True))
    if not pairs:
        raise ValueError("there is no answer to score; the question set is empty")
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
        "count": len(pairs),
    }
