"""Which trials are conducted: methods side by side, curves over their size, and ablations of MEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from learning import methods
from learning.runner import Result, Runner
from learning.top_layers import TopLayers
from learning.trial import Trial
from meft_engine.config import MeftConfig, OptimizerConfig

ROWS = MeftConfig().adapter.rows
LORA_RANK = 16
DENSE_KEY_NOISE = 0.01


@dataclass(frozen=True)
class Scope:
    """How much is tried. Learning rates stand around those that were best in trials with fewer facts."""

    trial: Trial = field(default_factory=lambda: Trial("meft"))
    """What all trials have in common."""
    rows: int = ROWS
    """Of MEFT and of the dense adapter, where they are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "meft": (1.25e-3, 2.5e-3, 5e-3),
            "lora_16": (4e-3, 8e-3, 1.6e-2),
            "lora_equal_bytes": (1.5e-3, 3e-3, 6e-3),
            "dense": (5e-4, 1.5e-3, 4.5e-3),
        }
    )
    sizes: Mapping[str, Mapping[int, tuple[float, ...]]] = field(
        default_factory=lambda: {
            "meft": {64: (1, 4), 256: (1, 2), 1024: (1,), 4096: (1,)},
            "dense": {64: (1, 8), 256: (1, 4), 1024: (1, 2), 4096: (1,)},
            "lora": {4: (1, 2), 64: (1,)},
        }
    )
    """Rows, or LoRA's rank, and learning rates to be tried, as multiples of the best one of the comparison: what is
    smaller wants to learn faster."""
    top_ks: Mapping[int, tuple[float, ...]] = field(default_factory=lambda: {64: (1.25e-3, 2.5e-3, 5e-3)})
    """With the learning rates of each."""
    caps: tuple[float, ...] = ()
    """Shares of the rows."""


QUICK = Scope(
    Trial("meft", facts=32, epochs=1, batch_size=16, adapter={"rows": 64, "top_k": 8}),
    rows=64,
    seeds=(0,),
    rates={"meft": (2e-2,), "lora_16": (8e-3,), "lora_equal_bytes": (3e-3,), "dense": (1e-3,)},
    sizes={"meft": {16: (1, 2)}},
    top_ks={4: (2e-2,)},
    caps=(0.5,),
)
"""Whether everything runs."""

# For which `make bench-quality` has no time.
MORE_TOP_KS = {
    4: (2.5e-3, 5e-3),
    16: (1.25e-3, 2.5e-3, 5e-3),
    24: (2.5e-3,),
    32: (2.5e-3,),
    64: (1.25e-3, 2.5e-3, 5e-3),
}
MORE_CAPS = (0.03, 0.06)

RATES_OF_MANY = {"meft": (1.25e-3, 2.5e-3, 5e-3), "lora_equal_bytes": (1e-3, 2e-3, 4e-3)}
"""With 1,500 facts, which take more steps. The other methods have fallen behind with fewer; a dense trial would then
take half an hour."""


@dataclass(frozen=True)
class Entry:
    """A result and what it is of."""

    study: str
    label: str
    result: Result


@dataclass(frozen=True)
class Comparison:
    """All results of some candidates, and the trial with the learning rate that each does best with."""

    entries: list[Entry]
    best: Mapping[str, Trial]

    def results(self, label: str) -> list[Result]:
        """Those with the best learning rate, one for each seed."""
        return [entry.result for entry in self.chosen() if entry.label == label]

    def chosen(self) -> list[Entry]:
        """Those with the best learning rates."""
        return [e for e in self.entries if e.result.trial.learning_rate == self.best[e.label].learning_rate]

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.entries + other.entries, {**self.best, **other.best})


def compare(runner: Runner, scope: Scope, model: str, first_layer: int) -> Comparison:
    """The methods that have learning rates, each with its best; MEFT always has.

    LoRA's second rank is the one at which it holds as many bytes on the device as MEFT does.
    """

    def tuned(candidates: Mapping[str, Trial]) -> Comparison:
        of_rates = {name: (trial, scope.rates[name]) for name, trial in candidates.items() if name in scope.rates}
        return _tuned(runner, scope, "methods", of_rates)

    common = scope.trial
    lora = replace(common, method="lora", rank=LORA_RANK, adapter={})
    first = tuned({"meft": common, "lora_16": lora})
    layers = TopLayers(model, first_layer).model.layers
    rank = methods.lora_rank_of_bytes(first.results("meft")[0]["device_bytes"], layers)
    # Where all rows compute, little noise in the keys is best.
    dense = replace(common, method="dense", rows=scope.rows, adapter={}, variant={"key_noise": DENSE_KEY_NOISE})
    return first + tuned({"lora_equal_bytes": lora.but(rank=rank), "dense": dense})


def _tuned(
    runner: Runner, scope: Scope, study: str, candidates: Mapping[str, tuple[Trial, tuple[float, ...]]]
) -> Comparison:
    """Every candidate with its learning rates; then, with the best of them, the other seeds.

    The best rate is the one with the lowest loss on what was trained, after training: the second wording has no say.
    """
    grid = [(name, trial.but(learning_rate=rate)) for name, (trial, rates) in candidates.items() for rate in rates]
    entries = _entries(runner, study, grid, f"{study.capitalize()}, learning rates")
    best = {
        name: min((e.result for e in entries if e.label == name), key=lambda result: result["trained_loss"]).trial
        for name in candidates
    }
    more = [(name, trial.but(seed=seed)) for name, trial in best.items() for seed in scope.seeds[1:]]
    return Comparison(entries + _entries(runner, study, more, f"{study.capitalize()}, other seeds"), best)


def sizes(runner: Runner, scope: Scope, comparison: Comparison) -> list[Entry]:
    """Exact match against the size of the adapter: rows, or LoRA's rank. What counts is each size's best trial."""
    grid = []
    for method, of_size in scope.sizes.items():
        for size, factors in of_size.items():
            trial = _of_size(comparison.best, method, size)
            grid += [(method, trial.but(learning_rate=factor * trial.learning_rate)) for factor in factors]
    return _entries(runner, "sizes", grid, "Sizes")


def _of_size(best: Mapping[str, Trial], method: str, size: int) -> Trial:
    """A method's best trial with another size; of LoRA the one with the nearest rank."""
    if method == "meft":
        return best["meft"].but(adapter={"rows": size})
    if method == "dense":
        return best["dense"].but(rows=size)
    distance = {trial: abs(math.log(trial.rank / size)) for trial in best.values() if trial.method == "lora"}
    return min(distance, key=distance.get).but(rank=size)


def sparsity(runner: Runner, scope: Scope, comparison: Comparison) -> Comparison:
    """What few rows cost: other top-K, each with its best learning rate, and caps that bind."""
    base, best = scope.trial, comparison.best["meft"]
    top_ks = {f"top_k = {k}": (base.but(adapter={"top_k": k}), rates) for k, rates in scope.top_ks.items()}
    caps = {
        f"cap = {share:.0%}": (best.but(active_rows={"cap": int(share * scope.rows)}), (best.learning_rate,))
        for share in scope.caps
    }
    return _tuned(runner, scope, "sparsity", {**top_ks, **caps})


def ablations(runner: Runner, scope: Scope, comparison: Comparison) -> list[Entry]:
    """One thing at a time is changed from the defaults, which alone get all seeds; half the facts, as many steps."""
    common = {"facts": scope.trial.facts // 2, "batch_size": scope.trial.batch_size // 2}
    base, dense = (comparison.best[method].but(**common) for method in ("meft", "dense"))
    changed = [(DEFAULTS, base)]
    for section, name, values in _ABLATED:
        shown = f"router.{name}" if section == "router" else name
        changed += [(f"{shown} = {value}", base.but(**{section: {name: value}})) for value in values]
    changed += [("weight_decay = 0.1", base.but(weight_decay=0.1))]
    # Whether it is these two that help, and not the routing.
    alike = dense.but(variant={"center_inputs": True, "value_lr_scale": OptimizerConfig().value_lr_scale})
    changed += [("dense", dense), ("dense, centered, fast values", alike)]
    grid = [
        (label, trial.but(seed=seed))
        for label, trial in changed
        for seed in (scope.seeds if label == DEFAULTS else scope.seeds[:ABLATED_SEEDS])
    ]
    return _entries(runner, "ablations", grid, "Ablations")


DEFAULTS = "defaults"
ABLATED_SEEDS = 2
_ABLATED = (
    ("adapter", "center_inputs", (False,)),
    ("adapter", "gate", ("sigmoid", "none")),
    ("adapter", "experts_per_token", (2, 4, 16)),
    ("adapter", "num_experts", (64, 256)),
    ("adapter", "init_keys", ("random",)),
    ("variant", "key_noise", (0.01,)),
    ("variant", "key_order", ("alike",)),
    ("variant", "router_init", ("random",)),
    ("variant", "router_scale", (0.3, 3.0)),
    ("variant", "pick_dropout", (0.1,)),
    ("router", "lr_scale", (0.03, 3.0)),
    ("router", "balance", ("none", "bias")),
    ("optimizer", "mode", ("dense_equivalent",)),
    ("optimizer", "value_lr_scale", (1.0, 8.0)),
    ("adapter", "layers_to_transform", ("0-4", "5-9")),
)


def _entries(runner: Runner, study: str, grid: list[tuple[str, Trial]], title: str) -> list[Entry]:
    results = runner.run([trial for _, trial in grid], title)
    return [Entry(study, label, result) for (label, _), result in zip(grid, results, strict=True)]
