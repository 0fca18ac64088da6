"""Scores of short answers, as SQuAD defines them: exact match and token F1 after normalisation.

Where several answers are right, as in Natural Questions, the best score counts. Solutions that end in a number, as in
GSM8K, are compared by that number.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?<!\d)-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, without punctuation and articles, words separated by one space."""
    text = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def final_number(answer: str) -> str:
    """The last number, written in one way (1,000.50 as 1000.5); empty if there is none."""
    numbers = _NUMBER.findall(answer)
    return f"{Decimal(numbers[-1].replace(',', '')).normalize() + 0:f}" if numbers else ""


def exact_match(prediction: str, *truths: str, form: Callable[[str], str] = normalize) -> float:
    """1.0 where the prediction is one of the right answers, all in this form, else 0.0."""
    return float(form(prediction) in map(form, truths))


def token_f1(prediction: str, *truths: str, form: Callable[[str], str] = normalize) -> float:
    """The harmonic mean of word precision and recall, of the right answer where it is best; two empty ones agree."""
    predicted = form(prediction).split()
    return max(_f1(predicted, form(truth).split()) for truth in truths)


def _f1(predicted: list[str], true: list[str]) -> float:
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def score(
    predictions: Sequence[str], truths: Sequence[Sequence[str]], form: Callable[[str], str] = normalize
) -> dict[str, float | int]:
    """The means over a question set: ``exact_match``, ``f1`` and ``count``.

    Args:
        truths: the right answers of each question. form: how an answer is written before it is compared.
    """
    answered = list(zip(predictions, truths, strict=True))
    if not answered:
        raise ValueError("there is no answer to score; the question set is empty")
    return {
        "exact_match": sum(exact_match(answer, *right, form=form) for answer, right in answered) / len(answered),
        "f1": sum(token_f1(answer, *right, form=form) for answer, right in answered) / len(answered),
        "count": len(answered),
    }
