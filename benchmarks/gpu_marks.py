"""What the figures of a GPU have to reach, and the model that a training step is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WHOLE_LAYERS = 32
CAPPED_BYTES = 24 << 30
"""Of a card's memory, for those that are to fit into 24 GB."""
# An element's gradient is read; its master and two moments, of 4 or 2 bytes each, are read and written.
BYTES_PER_TOUCHED_ELEMENT = {"fp32": 4 + 2 * (4 + 4 + 4), "bf16": 4 + 2 * (4 + 2 + 2)}

Figures = Mapping[str, Any]


def model_seconds(
    base_seconds: float, window: Figures, speeds: Figures, width: int, moments: str = "fp32"
) -> float | None:
    """Seconds of a step that waits for all that it moves: the frozen base's, then the bus, then the rows' update.

    Args:
        base_seconds: of the base alone with as many tokens. width: of a row.
        window: of a step, ``to_device_bytes``, ``to_host_bytes`` and ``touched_rows`` (keys and values each count).
        speeds: ``to_device``, ``to_host`` and ``host``, in bytes a second.
        moments: their precision.

    Returns:
        ``None`` where the bytes have not been counted.
    """
    names = ("to_device_bytes", "to_host_bytes", "touched_rows")
    if any(window.get(name) is None for name in names):
        return None
    to_device, to_host, touched = (window[name] for name in names)
    updated = touched * width * BYTES_PER_TOUCHED_ELEMENT[moments]
    return base_seconds + to_device / speeds["to_device"] + to_host / speeds["to_host"] + updated / speeds["host"]


@dataclass(frozen=True)
class Mark:
    """A figure that has to reach a limit."""

    name: str
    value: Callable[[Figures], float | None]
    """Of the figures of all stages; ``None`` where they do not say."""
    sign: str
    limit: float

    def reached(self, value: float) -> bool:
        """Whether it does."""
        return value <= self.limit if self.sign == "<=" else value >= self.limit


def verdicts(figures: Figures) -> dict[str, dict[str, Any]]:
    """Of each mark its ``value``, and as its ``verdict`` ``reached``, ``missed`` or ``not measured``.

    Where a model of fewer layers was trained, so it says; where tensors were tiny, nothing has been measured.
    """
    found = {}
    for mark in MARKS:
        value = None if figures.get("tiny") else mark.value(figures)
        verdict = "not measured" if value is None else "reached" if mark.reached(value) else "missed"
        layers = figures.get("fit24", {}).get("layers", WHOLE_LAYERS)
        if value is not None and mark.name.startswith("meft_") and layers != WHOLE_LAYERS:
            verdict += f" with {layers} of {WHOLE_LAYERS} layers"
        found[mark.name] = {"value": None if value is None else round(value, 4), "verdict": verdict}
    return found


def _errors_of_tests(figures: Figures) -> float | None:
    return figures.get("correctness", {}).get("failed")


def _errors_of_sanitizer(figures: Figures) -> float | None:
    found = list(figures.get("sanitizer", {}).values())
    return sum(found) if found and all(isinstance(errors, int) for errors in found) else None


def _disagreeing(figures: Figures) -> float | None:
    found = figures.get("kernels", {}).get("disagreeing")
    return None if found is None else len(found)


def _least_floor_share(figures: Figures) -> float | None:
    kernels = figures.get("kernels", {})
    return min((kernels[f"{name}_floor_over_fused"] for name in kernels.get("memory_bound", ())), default=None)


def _gather_over_copy(figures: Figures) -> float | None:
    return figures.get("bandwidth", {}).get("gather_over_copy")


def _windows(figures: Figures, contestant: str) -> dict[str, Figures]:
    """What a contestant has measured, by the number of accumulated micro-batches."""
    return figures.get("fit24", {}).get(contestant, {}).get("windows", {})


def _peak_gb(figures: Figures) -> float | None:
    fit = figures.get("fit24", {})
    runs = [fit[name] for name in ("meft", "meft_stale") if name in fit]
    if fit.get("layers", WHOLE_LAYERS) != WHOLE_LAYERS:
        return None
    # What ran out of memory wanted more than the card was allowed to have.
    peaks = [CAPPED_BYTES / 1e9 if run.get("out_of_memory") else run.get("peak_gb") for run in runs]
    return max((peak for peak in peaks if peak is not None), default=None)


def _least_over_model(figures: Figures) -> float | None:
    return min((w["over_model"] for w in _windows(figures, "meft").values() if w.get("over_model")), default=None)


def _over(figures: Figures, contestant: str, other: str, accumulation: str) -> float | None:
    """Tokens per second of one by those of another."""
    ours, theirs = (_windows(figures, name).get(accumulation) for name in (contestant, other))
    return ours["tokens_per_second"] / theirs["tokens_per_second"] if ours and theirs else None


def _least_over_zero_offload(figures: Figures) -> float | None:
    found = [_over(figures, "meft", "zero_offload", accumulation) for accumulation in _windows(figures, "meft")]
    return min((ratio for ratio in found if ratio is not None), default=None)


MARKS = (
    Mark("kernel_tests_failed", _errors_of_tests, "<=", 0),
    Mark("kernels_unlike_pytorch", _disagreeing, "<=", 0),
    Mark("sanitizer_errors", _errors_of_sanitizer, "<=", 0),
    Mark("memory_bound_kernels_floor_share", _least_floor_share, ">=", 0.7),
    Mark("gather_over_copy", _gather_over_copy, ">=", 0.85),
    Mark("meft_peak_gb", _peak_gb, "<=", 24.0),
    Mark("meft_over_model", _least_over_model, ">=", 0.8),
    Mark("meft_stale_over_base_32", lambda figures: _over(figures, "meft_stale", "base", "32"), ">=", 0.8),
    Mark("meft_over_zero_offload", _least_over_zero_offload, ">=", 3.0),
)
