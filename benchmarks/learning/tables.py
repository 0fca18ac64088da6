"""Results as files and figures: CSVs, the figures that have targets, and one table for people."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from learning.plan import Comparison, Entry
from learning.runner import Result

COLUMNS = (
    *("study", "label", "method", "facts", "learning_rate", "seed", "settings", "steps"),
    *("loss", "exact_match", "second_wording", "trained_loss", "second_wording_loss"),
    *("perplexity_before", "perplexity_after", "device_mib", "seconds_per_step"),
    *("touched_first_epoch", "touched_last_epoch", "kept_mass", "dead_experts"),
    *("text_touched_start", "text_touched_end", "text_touched_window", "text_kept_at_10pct", "text_kept_at_30pct"),
    *("text_shared_start", "text_shared_end", "same_fact", "other_fact"),
)


def row(entry: Entry) -> dict[str, Any]:
    """One line of the CSV."""
    result, trial = entry.result, entry.result.trial
    found = {
        "study": entry.study,
        "label": entry.label,
        "method": trial.method,
        "facts": trial.facts,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "settings": trial.settings,
        "steps": len(result["losses"]),
        "loss": result["loss"],
        "exact_match": result["trained_exact_match"],
        "second_wording": result["second_wording_exact_match"],
        "trained_loss": result["trained_loss"],
        "second_wording_loss": result["second_wording_loss"],
        "perplexity_before": result["perplexity_before"],
        "perplexity_after": result["perplexity_after"],
        "device_mib": result["device_bytes"] / 2**20,
        "seconds_per_step": result["seconds_per_step"],
    }
    if trial.method == "meft":
        found |= {
            "touched_first_epoch": result["touched_by_epoch"][0],
            "touched_last_epoch": result["touched_by_epoch"][-1],
            "kept_mass": result["kept_mass_by_epoch"][-1],
            "dead_experts": result["dead_experts_by_epoch"][-1],
            "text_touched_start": result["start_text_touched"],
            "text_touched_end": result["text_touched"],
            "text_touched_window": result["text_touched_window"],
            "text_kept_at_10pct": result["text_kept_by_cap"]["0.1"],
            "text_kept_at_30pct": result["text_kept_by_cap"]["0.3"],
            "text_shared_start": result["start_text_shared"],
            "text_shared_end": result["text_shared"],
            "same_fact": result["same_fact"],
            "other_fact": result["other_fact"],
        }
    return found


def write(path: Path, entries: Iterable[Entry]) -> None:
    """One line for each trial."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            line = row(entry)
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})


def write_losses(path: Path, comparison: Comparison) -> None:
    """The training loss of every step of the methods' best trials, with the seconds that had passed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "step", "seconds", "loss"])
        for method in comparison.best:
            for result in comparison.results(method):
                pace = result["seconds"] / len(result["losses"])
                for step, loss in enumerate(result["losses"], 1):
                    writer.writerow([method, result.trial.seed, step, f"{step * pace:.1f}", loss])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the distance between the largest and the smallest."""
    return statistics.fmean(values), (max(values) - min(values)) / 2


def by_method(comparison: Comparison) -> dict[str, dict[str, float]]:
    """For each method with its best rate, over the seeds: means, and for exact match the spread too."""
    found = {}
    for method, trial in comparison.best.items():
        results = comparison.results(method)

        def mean(name: str, results: list[Result] = results) -> float:
            return statistics.fmean(result[name] for result in results)

        exact = mean_and_spread([result["trained_exact_match"] for result in results])
        second = mean_and_spread([result["second_wording_exact_match"] for result in results])
        found[method] = {
            "learning_rate": trial.learning_rate,
            "exact_match": round(exact[0], 4),
            "exact_match_spread": round(exact[1], 4),
            "second_wording": round(second[0], 4),
            "second_wording_spread": round(second[1], 4),
            "loss": round(mean("loss"), 3),
            "perplexity_before": round(mean("perplexity_before"), 2),
            "perplexity_after": round(mean("perplexity_after"), 2),
            "device_mib": round(mean("device_bytes") / 2**20, 1),
            "seconds_per_step": round(mean("seconds_per_step"), 2),
        }
        if trial.method == "lora":
            found[method]["rank"] = trial.rank
        if trial.method == "meft":
            found[method]["text_touched"] = round(mean("text_touched"), 4)
            found[method]["text_kept_at_30pct"] = round(
                statistics.fmean(result["text_kept_by_cap"]["0.3"] for result in results), 4
            )
            found[method]["touched_last_epoch"] = round(
                statistics.fmean(result["touched_by_epoch"][-1] for result in results), 4
            )
            found[method]["kept_mass"] = round(
                statistics.fmean(result["kept_mass_by_epoch"][-1] for result in results), 4
            )
    return found


def lora_perplexity_at(exact_match: float, entries: Iterable[Entry]) -> float:
    """What LoRA's perplexity is where it matches as much, interpolated between its trials of all ranks and rates.

    The lowest perplexity at which LoRA matches at least so much counts for each of them: no trial that is worse in
    both speaks against LoRA. Beyond its best exact match, it is the perplexity there, which favours LoRA.
    """
    trials = sorted(
        (entry.result["trained_exact_match"], entry.result["perplexity_after"])
        for entry in entries
        if entry.result.trial.method == "lora"
    )
    front: list[tuple[float, float]] = []
    for match, perplexity in reversed(trials):
        if not front or perplexity < front[-1][1]:
            front.append((match, perplexity))
    front.reverse()
    if exact_match <= front[0][0]:
        return front[0][1]
    for (low, at_low), (high, at_high) in zip(front, front[1:], strict=False):
        if exact_match <= high:
            return at_low + (at_high - at_low) * (exact_match - low) / (high - low)
    return front[-1][1]
