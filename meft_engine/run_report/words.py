"""Numbers and names as people read them."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

PHASES = {
    "forward": "forward",
    "route": "routing",
    "gather": "gathering rows",
    "combine": "combining rows",
    "backward": "backward",
    "row_gradients": "row gradients",
    "exchange": "exchange between ranks",
    "norm": "gradient norm",
    "optimizer": "DeepSpeed's optimizer",
    "update": "row update",
    "wait": "waiting for rows",
    "save": "saving",
    "other": "data and script",
}
"""Of a step, in the order in which they are stacked."""

HOST = {"rows": "rows", "moments": "moments", "steps": "step counters"}
DEVICE = {
    "routers": "routers, trained",
    "keys": "keys",
    "slots": "slots of visiting rows",
    "gradient_slots": "gradient slots",
    "hot_rows": "rows of its own",
    "gradients": "gradients on their way",
}


def plain(value: float) -> str:
    """Four figures."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3g}"


def tick(value: float) -> str:
    """Of an axis: no figure more than needed."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def unit_of(most: float) -> tuple[int, str]:
    """In which bytes are best counted, the largest of which are so many."""
    return next(((2**power, name) for power, name in ((30, "GiB"), (20, "MiB")) if most >= 2**power), (2**10, "KiB"))


def model(name: str) -> str:
    """Without the folders that it lies in; a name of the hub as it is."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def size(count: float) -> str:
    """Bytes, by powers of 1024."""
    if not math.isfinite(count):
        return str(count)
    power = max((power for power in range(5) if abs(count) >= 1024**power), default=0)
    unit, count = ("B", "KiB", "MiB", "GiB", "TiB")[power], count / 1024**power
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds, or hours and minutes where they are many."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def share(value: float) -> str:
    """Of one, in percent."""
    return f"{100 * value:.3g} %" if math.isfinite(value) else str(value)


def count(value: float) -> str:
    """Thousands, millions, billions."""
    for unit, suffix in ((1e9, " G"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:,.0f}"


def moment(seconds: float) -> str:
    """A time of the clock, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def setting(value: Any) -> str:
    """A value as the JSON has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(setting, value)) if isinstance(value, list) else str(value)


def layer_numbers(names: list[str]) -> list[str]:
    """Layers by the number in their names, where it tells them apart; else by their place."""
    found = [next((part for part in name.split(".") if part.isdecimal()), "") for name in names]
    return found if len(set(found)) == len(found) and "" not in found else [str(place) for place in range(len(names))]
