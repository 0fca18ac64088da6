"""What several ranks exchange in a step, in bytes and seconds, beside a dense all-reduce of the same adapter.

Worlds of 1, 2 and 4 processes train the rows of one adapter on this machine; a model goes on to 1,024 ranks from
constants that are measured here. Prints a line for each figure with its floor; the last line is one JSON object.
Writes two CSVs and a picture. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ranks_model as model
from machine import describe, footnote
from ranks_cases import Case, Plan, Shape, cases_of
from ranks_network import enter_quiet_network, loopback_bandwidth
from ranks_world import run_world
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from meft_engine.cores import rank_cores
from meft_engine.planner.network import ID_BYTES
from meft_kernels.dispatch import row_passes

HERE = Path(__file__).resolve().parent
PERCENTS, MIDDLE = (3.0, 10.0, 30.0), 10.0
MODELLED = Shape(width=4096, layers=32, rows=8192)

# What each figure may be at most.
TARGETS = {"bytes_over_touched_rows": 1.02, "host_pss_ratio_4": 1.05}


@dataclass(frozen=True)
class Result:
    """What a world took for one thing. Bytes are those of a rank and step; all of them sums over ranks ÷ ranks."""

    what: str
    shape: Shape
    ranks: int
    case: Case | None
    seconds: list[float]
    bytes: float
    floor_bytes: float
    foreign_rows: float = 0.0
    kernel_bytes: float | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def over_touched(self) -> float:
        """Bytes over those of the gradients alone that others own, without ids."""
        wire = {"fp32": 4, "bf16": 2}[self.case.wire]
        return self.bytes / (self.foreign_rows * self.shape.width * wire)

    def floor(self, bandwidth: float, cores: int) -> float:
        """Seconds of its bytes through loopback, where two cores carry one connection."""
        return self.floor_bytes * self.ranks / (bandwidth * max(1, min(self.ranks, cores) // 2))


def results_of(ranks: int, plan: Plan, found: Sequence[Mapping[str, Any]]) -> list[Result]:
    """From what the ranks of a world wrote: a step takes as long as its slowest rank."""
    results = []
    for parts in zip(*(each["steps"] for each in found), strict=True):
        shape, case = plan.shapes[parts[0]["shape"]], plan.cases[parts[0]["case"]]
        mean = {key: sum(part[key] for part in parts) / ranks for key in ("sent", "published", "floor_bytes")}
        kernel = parts[0]["kernel"]
        kernel = kernel / ranks if kernel is not None and ranks > 1 else None
        seconds = {key: _slowest(part["seconds"][key] for part in parts) for key in parts[0]["seconds"]}
        own = (shape, ranks, case)
        foreign = sum(part["foreign_rows"] for part in parts) / ranks
        exchange_kernel = kernel if case.nodes == 1 else None
        results.append(
            Result("exchange", *own, seconds["exchange"], mean["sent"], mean["floor_bytes"], foreign, exchange_kernel)
        )
        if case.nodes > 1:
            updated = sum(part["updated_rows"] for part in parts) / ranks
            floor = updated * (case.nodes - 1) * (ID_BYTES + shape.width * 2)
            both = [a + b for a, b in zip(seconds["exchange"], seconds["publication"], strict=True)]
            results.append(Result("publication", *own, seconds["publication"], mean["published"], floor, updated))
            whole = mean["sent"] + mean["published"], mean["floor_bytes"] + floor
            results.append(Result("exchange and publication", *own, both, *whole, foreign, kernel))
        else:
            results.append(Result("update of owned rows", *own, seconds["update"], 0.0, 0.0))
    for parts in zip(*(each["dense"] for each in found), strict=True):
        shape = plan.shapes[parts[0]["shape"]]
        sent = 2 * (ranks - 1) / ranks * shape.dense_bytes
        kernel = parts[0]["kernel"] / ranks if parts[0]["kernel"] is not None else None
        seconds = _slowest(part["seconds"]["all_reduce"] for part in parts)
        results.append(Result("dense all-reduce", shape, ranks, None, seconds, sent, sent, kernel_bytes=kernel))
    return results


def _slowest(of_ranks: Any) -> list[float]:
    return [max(step) for step in zip(*of_ranks, strict=True)]


def points_of(ranks: int, found: Sequence[Mapping[str, Any]]) -> list[model.Point]:
    """Collectives alone."""
    points = []
    for parts in zip(*(each["collectives"] for each in found), strict=True):
        seconds = float(np.median(_slowest(part["seconds"] for part in parts)))
        points.append(model.Point(parts[0]["kind"], ranks, parts[0]["peer_bytes"], seconds))
    return points


def host_memory(found: Sequence[Mapping[str, Any]], shape: int) -> int:
    """Bytes that the tables and their optimizer take on the node, by PSS."""
    own = [next(entry for entry in each["memory"] if entry["shape"] == shape) for each in found]
    return sum(entry["after"] - entry["before"] for entry in own)


def constants_of(points: Sequence[model.Point], results: Sequence[Result], cores: int) -> tuple[model.Constants, float]:
    """What the model rests on, and how far its collectives are off."""
    constants, off = model.fit(points, cores)
    exchanges = [(load_of(r), r.median) for r in results if r.what == "exchange" and r.ranks > 1 and r.case.nodes == 1]
    constants = model.with_handling(constants, exchanges, cores)
    dense = [(load_of(r), r.median) for r in results if r.what == "dense all-reduce"]
    return model.with_reduction(constants, dense, cores), off


def load_of(result: Result) -> model.Load:
    """What the model makes of something that was measured."""
    case = result.case or Case(100.0)
    options = {"wire_bytes": 2 if case.wire == "bf16" else 4, "ranks_of_node": result.ranks // case.nodes}
    return model.load(result.shape, result.ranks, case.percent, case.overlap, **options)


def modelled(result: Result, constants: model.Constants, cores: int) -> float | None:
    """Seconds that the model gives for something that was measured; ``None`` where it says nothing of it."""
    if result.what == "update of owned rows":
        return None
    crowd, load = model.crowd(result.ranks, cores), load_of(result)
    if result.what == "dense all-reduce":
        return crowd * model.dense_seconds(constants, load)
    seconds = model.exchange_seconds(constants, load)
    parts = [seconds[part] for part in ("exchange", "publication") if part in result.what]
    return crowd * sum(parts)


def rows_of_csv(
    results: Sequence[Result], constants: model.Constants, bandwidth: float, cores: int
) -> list[dict[str, Any]]:
    """One line for each thing that was measured."""
    lines = []
    for r in results:
        floor, predicted = r.floor(bandwidth, cores), modelled(r, constants, cores)
        case = r.case
        quartiles = np.quantile(r.seconds, (0.25, 0.75)) * 1e3
        lines.append(
            {
                **{"what": r.what, "ranks": r.ranks, "nodes_played": case.nodes if case else 1},
                **{"width": r.shape.width, "tables": r.shape.tables, "rows": r.shape.rows},
                "touched_percent": case.percent if case else 100,
                "overlap": case.overlap if case else "equal",
                "wire": case.wire if case else "fp32",
                **{"steps": len(r.seconds), "median_ms": f"{r.median * 1e3:.3f}"},
                **{"first_quartile_ms": f"{quartiles[0]:.3f}", "third_quartile_ms": f"{quartiles[1]:.3f}"},
                "bytes": round(r.bytes),
                "kernel_bytes": "" if r.kernel_bytes is None else round(r.kernel_bytes),
                "rows_of_others": f"{r.foreign_rows:.1f}",
                "floor_bytes": round(r.floor_bytes),
                "floor_ms": f"{floor * 1e3:.3f}" if floor else "",
                "time_over_floor": f"{r.median / floor:.2f}" if floor else "",
                "model_ms": "" if predicted is None else f"{predicted * 1e3:.3f}",
            }
        )
    return lines


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Columns as the first line has them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in line.items()})


def show_results(lines: Sequence[Mapping[str, Any]]) -> None:
    """For people, with the floor beside each."""
    table = Table(
        *("what", "ranks", "width", "touched", "ms", "floor ms", "model ms", "MB a rank", "by the kernel", "floor MB"),
        title="Of a step; floors are the bytes that cannot be spared, at loopback's bandwidth",
    )
    for line in lines:
        played = f", {line['nodes_played']} nodes played" if line["nodes_played"] > 1 else ""
        touched = f"{line['touched_percent']:g} %, {line['overlap']}, {line['wire']}{played}"
        times = [line["median_ms"], line["floor_ms"], line["model_ms"]]
        sizes = [f"{line[key] / 1e6:.3f}" if line[key] else "" for key in ("bytes", "kernel_bytes", "floor_bytes")]
        table.add_row(line["what"], str(line["ranks"]), str(line["width"]), touched, *times, *sizes)
    Console(width=150).print(table)


def show_model(lines: Sequence[Mapping[str, Any]]) -> None:
    """The model's default precision on a cluster, with random rows."""
    columns = {
        **{"gradients_seconds": "gradients", "handling_seconds": "handling", "publication_seconds": "publication"},
        **{"seconds": "all", "message_seconds": "if empty", "network_seconds": "network alone"},
        **{"dense_seconds": "dense", "dense_network_seconds": "dense, network alone"},
    }
    title = f"Modelled: {MODELLED}, 8 ranks a node, fp32 on the way, random rows; seconds of a step"
    table = Table("touched by each", "ranks", *columns.values(), title=title)
    for line in lines:
        values = [f"{line[name]:.3g}" if line[name] else "" for name in columns]
        table.add_row(f"{line['touched_percent']:g} %", str(line["ranks"]), *values)
    Console(width=150).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, help="steps of every case (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a world may take (default: 900)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into runs/bench: does it run?")
    args = parser.parse_args(arguments)
    args.repetitions = args.repetitions or (2 if args.quick else 9)
    args.out = args.out or (HERE.parent / "runs" / "bench" if args.quick else HERE / "results")
    if args.repetitions < 1:
        parser.error("--repetitions has to be at least 1")
    return args


def plans_of(args: argparse.Namespace) -> dict[int, Plan]:
    """What each world does, by its ranks. The first shape is the one that figures are of."""
    shapes, peer_bytes = [Shape(2048, 2, 8192), Shape(576, 4, 8192)], (64, 64 << 10, 1 << 20, 4 << 20)
    if args.quick:
        shapes, peer_bytes = [Shape(512, 1, 4096)], (64, 64 << 10)
    worlds = {}
    for ranks in (1, 2, 4):
        cases = cases_of(ranks, (MIDDLE,) if args.quick else PERCENTS, MIDDLE)
        worlds[ranks] = Plan(shapes, cases, args.repetitions, peer_bytes, back_to_back=5 if args.quick else 30)
    if not args.quick:
        worlds[8] = Plan([], [], args.repetitions, peer_bytes)  # collectives alone, for the model
    return worlds


def measure(
    args: argparse.Namespace, worlds: Mapping[int, Plan]
) -> tuple[list[Result], list[model.Point], dict[int, int]]:
    """Run the worlds, one after the other; of the last, bytes of host memory by the number of ranks."""
    results, points, memory = [], [], {}
    row_passes()  # compiled before worlds need it
    for ranks, plan in tqdm(worlds.items(), disable=None, unit="world"):
        found = run_world(ranks, plan, args.timeout)
        results += results_of(ranks, plan, found)
        points += points_of(ranks, found)
        if plan.shapes:
            memory[ranks] = host_memory(found, 0)
    return results, points, memory


def main() -> int:
    """Measure, print and write."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank outlives it
    quiet = enter_quiet_network()
    cores, began = len(rank_cores()), time.monotonic()
    for line in describe(cores):
        print(line)
    busy = psutil.cpu_percent(interval=1.0)
    if busy > 10:
        print(f"WARNING: other work keeps the cores {busy:.0f} % busy; seconds are too long")
    print(
        "bytes by the kernel: the loopback counter of "
        + ("a network of its own" if quiet else "this machine's network")
    )
    moved = (32 if args.quick else 1024) << 20
    bandwidth = loopback_bandwidth(moved)
    worlds = plans_of(args)
    results, points, memory = measure(args, worlds)
    bandwidth = max(bandwidth, loopback_bandwidth(moved))
    print(f"floor: one connection over loopback moves {bandwidth / 1e9:.2f} GB/s, with a core at each end")
    constants, off = constants_of(points, results, cores)
    lines = rows_of_csv(results, constants, bandwidth, cores)
    sets = {"this machine": constants, "cluster": constants.on_cluster()}
    curves = model.table(sets, MODELLED, PERCENTS)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "ranks.csv", lines)
    write_csv(args.out / "ranks_model.csv", curves)
    show_results(lines)
    print(f"constants of the model, fitted times of collectives off by {100 * off:.0f} %: {model.rounded(constants)}")
    of_cluster = [line for line in curves if line["constants"] == "cluster" and line["wire"] == "fp32"]
    drawn = [line for line in of_cluster if line["overlap"] == "random"]
    show_model(drawn)
    figures = figures_of(results, memory, worlds[1].shapes[0], drawn)
    _draw(args.out / "ranks.png", results, worlds[1].shapes[0], drawn, footnote(cores))
    verdicts = Table(
        "figure", "measured", "at most", "", title="Tiny sizes: not comparable" if args.quick else "Targets"
    )
    missed = [name for name, most in TARGETS.items() if not figures[name] <= most]
    for name, most in TARGETS.items():
        verdict = "[bold red]missed[/]" if name in missed else "[green]held[/]"
        verdicts.add_row(name, f"{figures[name]:.4f}", f"{most:g}", verdict)
    Console().print(verdicts)
    extras = {
        **{
            "loopback_gb_per_s": round(bandwidth / 1e9, 3),
            "quiet_network": quiet,
            "constants": model.rounded(constants),
        },
        **{"constants_off": round(off, 3), "cores_busy_before_percent": busy, "cores": cores, "quick": args.quick},
        **{"repetitions": args.repetitions, "seconds_in_all": round(time.monotonic() - began), "missed": missed},
    }
    print(json.dumps({**figures, **extras}), flush=True)
    return 0


def figures_of(
    results: Sequence[Result], memory: Mapping[int, int], shape: Shape, drawn: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the last line says: of ``shape`` at ``MIDDLE`` % of the rows, drawn at random, in fp32."""
    exchanges = {r.ranks: r for r in results if r.what == "exchange" and r.shape == shape and r.case == Case(MIDDLE)}
    dense = {r.ranks: r for r in results if r.what == "dense all-reduce" and r.shape == shape}
    fp32 = [r for r in results if r.what == "exchange" and r.ranks > 1 and r.case.wire == "fp32"]
    counted = [r.kernel_bytes / r.bytes for r in fp32 if r.kernel_bytes is not None]
    figures: dict[str, Any] = {f"seconds_{ranks}": round(r.median, 6) for ranks, r in exchanges.items()}
    figures |= {f"bytes_{ranks}": round(r.bytes) for ranks, r in exchanges.items()}
    figures |= {f"kernel_bytes_{n}": round(r.kernel_bytes) for n, r in exchanges.items() if r.kernel_bytes is not None}
    figures |= {f"dense_seconds_{ranks}": round(r.median, 6) for ranks, r in dense.items()}
    figures |= {f"dense_bytes_{ranks}": round(r.bytes) for ranks, r in dense.items()}
    figures |= {
        "bytes_over_touched_rows": round(max(r.over_touched for r in fp32), 5),
        "kernel_bytes_over_bytes": round(max(counted), 5) if counted else None,
        **{f"host_pss_{ranks}": value for ranks, value in memory.items()},
        "host_pss_ratio_4": round(memory[4] / memory[1], 4),
    }
    last = next(line for line in drawn if line["ranks"] == 1024 and line["touched_percent"] == MIDDLE)
    figures |= {
        "model_seconds_1024": round(last["seconds"], 4),
        "model_dense_seconds_1024": round(last["dense_seconds"], 4),
    }
    for name in ("message_seconds", "network_seconds", "dense_network_seconds"):
        figures[f"model_{name}_1024"] = round(last[name], 4)
    for percent in PERCENTS:
        own = [line for line in drawn if line["touched_percent"] == percent]
        figures[f"model_gain_ends_{percent:g}pct"] = model.gain_ends(own, "seconds")
        figures[f"model_network_gain_ends_{percent:g}pct"] = model.gain_ends(own, "network_seconds")
    return figures


def _draw(path: Path, results: Sequence[Result], shape: Shape, drawn: Sequence[Mapping[str, Any]], note: str) -> None:
    from ranks_plot import draw

    measured: dict[float, dict[int, float]] = {percent: {} for percent in PERCENTS}
    for r in results:
        if r.what == "exchange" and r.shape == shape and r.case == Case(r.case.percent):
            measured[r.case.percent][r.ranks] = r.median
    dense = {r.ranks: r.median for r in results if r.what == "dense all-reduce" and r.shape == shape}
    draw(path, measured, dense, drawn, (str(shape), str(MODELLED)), note)


if __name__ == "__main__":
    sys.exit(main())
