"""How much each method learns of a set of facts, and what it forgets: MEFT, LoRA and a dense adapter side by side.

    python benchmarks/quality.py [--full] [--facts 400]

SmolLM2-135M learns which city an airport's code stands for, closed-book, through adapters in its last ten layers. What
the frozen layers below compute is the same in every step, so it is computed once. Each method gets three learning
rates; the best gets three seeds. Trials run side by side, one on each core, and are kept: an interrupted run goes on.
``benchmarks/README.md`` says what the figures are. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launch"))  # for the facts and the model of the demo

from learning import plan, plots, tables  # noqa: E402
from learning.runner import Runner  # noqa: E402
from learning.trial import Trial  # noqa: E402
from model_zoo import smollm2  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

FIRST_LAYER = 20
MANY = 1500


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are what `make bench-quality` runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="1,500 facts, and all ablations besides")
    parser.add_argument("--quick", action="store_true", help="whether it runs: few facts, one epoch, no figures")
    parser.add_argument("--model", help="folder of another model of the Llama family; else SmolLM2-135M is fetched")
    parser.add_argument("--facts", type=int, default=400, help="number of airports of the first comparison")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="where trials are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
    parser.add_argument(
        "--any_code", action="store_true", help="also take trials that were kept before the code changed"
    )
    return parser.parse_args(argv)


def figures(few: plan.Comparison, sparse: plan.Comparison, many: plan.Comparison | None) -> dict[str, float]:
    """The figures that have targets."""
    methods = tables.by_method(few)
    meft = methods["meft"]
    wide = [result["trained_exact_match"] for result in sparse.results("top_k = 64")]
    lora = tables.lora_perplexity_at(meft["exact_match"], few.entries)
    found = {
        "second_wording_over_lora_16": meft["second_wording"] - methods["lora_16"]["second_wording"],
        "text_touched": meft["text_touched"],
        "kept_mass": meft["kept_mass"],
        "below_top_k_64": sum(wide) / len(wide) - meft["exact_match"],
        "perplexity_rise_over_lora": (meft["perplexity_after"] - meft["perplexity_before"])
        / (lora - meft["perplexity_before"]),
    }
    if many is not None:
        methods = tables.by_method(many)
        found["second_wording_over_equal_bytes_1500"] = (
            methods["meft"]["second_wording"] - methods["lora_equal_bytes"]["second_wording"]
        )
    return {name: found[name] for name in TARGETS if name in found}


@dataclass(frozen=True)
class Target:
    """What a figure has to be, and what it is of."""

    relation: str
    value: float
    what: str

    def reached_by(self, figure: float) -> bool:
        """Whether a figure is what it has to be."""
        return {"≥": figure >= self.value, "≤": figure <= self.value, "<": figure < self.value}[self.relation]


TARGETS = {
    "second_wording_over_lora_16": Target(
        "≥", 0.0, "exact match in the second wording, few facts: MEFT's, less that of LoRA of rank 16"
    ),
    "second_wording_over_equal_bytes_1500": Target(
        "≥", 0.05, "the same with 1,500 facts, less that of LoRA of as many bytes on the device"
    ),
    "text_touched": Target("≤", 0.30, "share of the rows that 512 tokens of text touch, at the end of training"),
    "kept_mass": Target(
        "≥", 0.98, "share of the activation that is kept, in the last epoch (by default there is no cap)"
    ),
    "below_top_k_64": Target("≤", 0.02, "exact match with K = 64 and no cap, less that of the defaults"),
    "perplexity_rise_over_lora": Target(
        "<",
        1.0,
        "rise of the perplexity, over that of LoRA where it matches as much (between its trials of all ranks and rates;"
        " beyond its best, there)",
    ),
}


def show(methods: Mapping[str, Mapping[str, Any]], facts: int) -> None:
    """The methods side by side, for people."""
    table = Table("method", "learning rate", "exact match", "second wording", "perplexity", "on the device", "step")
    table.title = f"{facts} facts, best learning rate of each, three seeds (± half the range)"
    for name, of in methods.items():
        label = f"{name} (rank {of['rank']})" if "rank" in of else name
        table.add_row(
            label,
            f"{of['learning_rate']:g}",
            f"{of['exact_match']:.3f} ± {of['exact_match_spread']:.3f}",
            f"{of['second_wording']:.3f} ± {of['second_wording_spread']:.3f}",
            f"{of['perplexity_before']:.1f} → {of['perplexity_after']:.1f}",
            f"{of['device_mib']:.0f} MiB",
            f"{of['seconds_per_step']:.2f} s",
        )
    Console().print(table)


def show_figures(found: Mapping[str, float]) -> None:
    """The figures that have targets, for people."""
    table = Table("figure", "value", "target", "")
    for name, value in found.items():
        target = TARGETS[name]
        mark = "reached" if target.reached_by(value) else "MISSED"
        table.add_row(name, f"{value:.3f}", f"{target.relation} {target.value:g}", mark)
    Console().print(table)


def write_figures(path: Path, found: Mapping[str, float]) -> None:
    """The figures that have targets, with what they are of."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["figure", "value", "target", "reached", "what"])
        for name, value in found.items():
            target = TARGETS[name]
            wanted = f"{target.relation} {target.value:g}"
            writer.writerow([name, f"{value:.4g}", wanted, "yes" if target.reached_by(value) else "no", target.what])


def main() -> int:
    """Command line, see the top of this file."""
    args = parse_arguments()
    started = time.monotonic()
    model = args.model or str(smollm2())
    runner = Runner(model, FIRST_LAYER, args.work, any_code=args.any_code)
    scope = plan.QUICK if args.quick else plan.Scope(Trial("meft", facts=args.facts))
    if args.full:
        scope = replace(scope, top_ks=plan.MORE_TOP_KS, caps=plan.MORE_CAPS)
    few = plan.compare(runner, scope, model, FIRST_LAYER)
    many = None
    if args.full:
        wide = replace(scope, trial=Trial("meft", facts=MANY), rates=plan.RATES_OF_MANY)
        many = plan.compare(runner, wide, model, FIRST_LAYER)
    sparse = plan.sparsity(runner, scope, few)
    sized = plan.sizes(runner, scope, few)
    ablated = plan.ablations(runner, scope, few) if args.full else []

    found = {} if args.quick else figures(few, sparse, many)
    out = args.work / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    stem = "quality_full" if args.full else "quality"
    entries = few.entries + sparse.entries + sized + (many.entries if many else []) + ablated
    tables.write(out / f"{stem}.csv", entries)
    write_figures(out / f"{stem}_figures.csv", found)
    tables.write_losses(out / f"{stem}_losses.csv", many or few)
    plots.draw_methods(out / f"{stem}.png", few, sized)
    if many:
        plots.draw_methods(out / f"{stem}_{MANY}.png", many, [])
    plots.draw_sparsity(out / f"{stem}_sparsity.png", few.chosen() + sparse.chosen())
    show(tables.by_method(few), scope.trial.facts)
    if many:
        show(tables.by_method(many), MANY)
    if found:
        show_figures(found)
    last = {
        **tables.by_method(few),
        **({f"facts_{MANY}": tables.by_method(many)} if many else {}),
        "figures": {name: round(value, 4) for name, value in found.items()},
        "missed": [name for name, value in found.items() if not TARGETS[name].reached_by(value)],
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(last), flush=True)
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
