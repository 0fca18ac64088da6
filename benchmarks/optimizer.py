"""How fast the row optimizer is, beside DeepSpeedCPUAdam, torch's SparseAdam and the machine's own memory.

Prints a line for each figure with its floor, then figures against targets; the last line is one JSON object. Writes a
CSV, a picture and a description of the machine. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import overlap
import psutil
import torch
from machine import describe, footnote, last_level_cache
from measure import Timing, copy_bandwidth, write_csv
from plot import draw
from rich.console import Console
from rich.table import Table
from steps import COMPARED, GROWTH, Comparison, Contest, Growth, step_sparse
from tqdm import tqdm

from meft_engine.cores import rank_cores

HERE = Path(__file__).resolve().parent

# What each figure has to reach, and whether from above or from below.
TARGETS = {
    "speedup_cpuadam_1pct": (">=", 60.0),
    "speedup_cpuadam_10pct": (">=", 8.5),
    "speedup_cpuadam_100pct": (">=", 0.9),
    "speedup_sparseadam_10pct": (">=", 12.0),
    "bandwidth_ratio_10pct": (">=", 0.85),
    "bf16_moments_ratio": (">=", 1.25),
    "growth_with_r": ("<=", 1.2),
    "overlap_hidden_share": (">=", 0.8),
}


def figures_of(
    contest: Contest, sparse: dict[float, Timing], growth: list[Timing], hidden: dict[str, float]
) -> dict[str, float]:
    """What is held against the targets, under the names of ``TARGETS``."""
    dense, tenth = contest.dense.median, contest.ours[10]
    return {
        **{f"speedup_cpuadam_{share}pct": dense / contest.ours[share].median for share in COMPARED},
        "speedup_sparseadam_10pct": sparse[10].median / tenth.median,
        "bandwidth_ratio_10pct": tenth.bandwidth / contest.dense.bandwidth,
        "bf16_moments_ratio": tenth.median / contest.half[10].median,
        "growth_with_r": growth[1].median / growth[0].median,
        "overlap_hidden_share": hidden["sleep"],
    }


def floors_of(contest: Contest, sparse: dict[float, Timing], layers: int) -> dict[str, float]:
    """What the figures would be if every byte moved at DeepSpeedCPUAdam's bandwidth and nothing else took time."""
    floor = {share: timing.moved / contest.dense.bandwidth for share, timing in contest.ours.items()}
    return {
        **{f"speedup_cpuadam_{share}pct": contest.dense.median / floor[share] for share in COMPARED},
        "speedup_sparseadam_10pct": sparse[10].median / floor[10],
        "bandwidth_ratio_10pct": 1.0,
        "bf16_moments_ratio": contest.ours[10].moved / contest.half[10].moved,
        "growth_with_r": 1.0,
        # The first layer has nothing to hide behind.
        "overlap_hidden_share": 1 - 1 / layers,
    }


def held(name: str, figure: float) -> bool:
    """Whether a figure reaches its target."""
    sign, target = TARGETS[name]
    return figure >= target if sign == ">=" else figure <= target


def show(figures: dict[str, float], floors: dict[str, float], quick: bool) -> None:
    """Figures against floors and targets, for people."""
    title = "Tiny sizes: nothing here can be compared with the targets" if quick else "Figures and targets"
    table = Table("figure", "measured", "at the floor", "target", "", title=title)
    for name, figure in figures.items():
        sign, target = TARGETS[name]
        verdict = "[green]held[/]" if held(name, figure) else "[bold red]missed[/]"
        table.add_row(name, f"{figure:.3g}", f"{floors[name]:.3g}", f"{sign} {target:g}", verdict)
    Console().print(table)


def check_sizes(args: argparse.Namespace) -> int:
    """The last-level cache in bytes (quick: 0), after a check that the tables are far larger and fit into memory.

    Raises:
        SystemExit: with one sentence, if they do not.
    """
    cache = last_level_cache() or 0
    elements = args.rows * args.width
    working_set = 12 * elements
    print(
        f"working set: {working_set / 2**20:,.0f} MiB (table and moments), "
        + (f"{working_set / cache:.1f} times the last-level cache of {cache / 2**20:.0f} MiB" if cache else "")
    )
    if working_set <= 4 * cache and not args.quick:
        raise SystemExit(
            f"--rows {args.rows} and --width {args.width} make a working set of no more than four times the last-level "
            f"cache; from {4 * cache // (12 * args.width) + 1} rows on, memory is measured and not the cache"
        )
    # What is there at the same time: two tables of 1 and 16 times the rows, half as wide, 12 bytes an element; three
    # tables of the full width, a gradient, and some room.
    need = 12 * elements * (GROWTH + 1) // 2 + elements * (12 + 8 + 12 + 12)
    available = psutil.virtual_memory().available
    if need > available:
        raise SystemExit(
            f"--rows {args.rows} and --width {args.width} need {need / 2**30:.1f} GiB of memory; "
            f"{available / 2**30:.1f} GiB are available"
        )
    return 0 if args.quick else cache


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of the table (default: 16384)")
    parser.add_argument("--width", type=int, help="of a row (default: 4096)")
    parser.add_argument("--repetitions", type=int, help="of every case (default: 61)")
    parser.add_argument("--threads", type=int, default=len(rank_cores()), help="of all contestants (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into runs/bench: does it run?")
    args = parser.parse_args(arguments)
    rows, width, repetitions, out = (2048, 256, 3, HERE.parent / "runs" / "bench")
    if not args.quick:
        rows, width, repetitions, out = 16384, 4096, 61, HERE / "results"
    args.rows, args.width = args.rows or rows, args.width or width
    args.repetitions, args.out = args.repetitions or repetitions, args.out or out
    if args.rows < 1000 or args.width < 2 or args.repetitions < 1 or args.threads < 1:
        parser.error("--rows has to be at least 1000, --width 2, --repetitions and --threads 1")
    return args


def main() -> int:
    """Measure, print and write."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    for line in describe(args.threads):
        print(line)
    cache, busy = check_sizes(args), psutil.cpu_percent(interval=1.0)
    if busy > 10:
        print(f"WARNING: other work keeps the cores {busy:.0f} % busy; two threads then wait for each other")
    layers = 4 if args.quick else 16
    overlapped = max(3, args.repetitions // 3)

    sizes = (args.threads, cache)
    with tqdm(total=2 * args.repetitions + 8 + overlapped, disable=None, unit="round") as bar:
        # All memory is taken before anything is timed and given back afterwards: a system that is busy with what was
        # freed (and a hypervisor that takes it back) is felt by everything that runs meanwhile.
        table, grown = Comparison(args.rows, args.width, *sizes), Growth(args.rows, args.width // 2, *sizes)
        bar.set_description("steps of one table")
        contest = table.run(args.repetitions, bar.update)
        bar.set_description("growth with the table")
        growth = grown.run(args.repetitions, bar.update)
        copy = copy_bandwidth(max(args.rows * args.width, cache), 7)
        floor = contest.dense.bandwidth
        tqdm.write(
            f"floor: DeepSpeedCPUAdam's dense step moves {floor / 1e9:.1f} GB/s; a copy by torch moves "
            f"{copy.bandwidth / 1e9:.1f} GB/s, read and written (what caches fetch besides is not counted)"
        )
        for timing in (*contest.timings(), *growth):
            tqdm.write(timing.line(floor))
        table.close(), grown.close()
        del table, grown
        gc.collect()

        bar.set_description("steps of SparseAdam")
        sparse = step_sparse(args.rows, args.width, *sizes, args.repetitions, bar.update)
        for timing in sparse.values():
            tqdm.write(timing.line(floor))
        gc.collect()

        bar.set_description("overlap with a forward")
        found = overlap.measure(layers, args.rows // 2, args.width // 2, overlapped, bar.update)
        hidden = {name: overlap.hidden_share(found, name) for name in ("sleep", "matmul")}
        for timing in found.values():
            tqdm.write(timing.line(floor))

    figures, floors = (
        figures_of(contest, sparse, growth, hidden),
        floors_of(contest, sparse, layers),
    )
    timings = [copy, *contest.timings(), *sparse.values(), *growth, *found.values()]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "optimizer.csv", timings, floor)
    (args.out / "machine.txt").write_text("\n".join(describe(args.threads)) + "\n", encoding="utf-8")
    size, note = f"{args.rows:,} × {args.width:,}", footnote(args.threads)
    draw(args.out / "optimizer.png", contest, sparse, found, hidden["sleep"], size, note)
    show(figures, floors, args.quick)
    extras = {
        # A forward that works leaves the update no core of its own where it uses all of them.
        "overlap_hidden_share_two_cores": round(hidden["matmul"], 3),
        "cpuadam_ms": round(contest.dense.median * 1e3, 2),
        **{f"ours_{share}pct_ms": round(contest.ours[share].median * 1e3, 3) for share in COMPARED},
        "ours_bf16_moments_10pct_ms": round(contest.half[10].median * 1e3, 3),
        "sparseadam_10pct_ms": round(sparse[10].median * 1e3, 2),
        "growth_ms": [round(timing.median * 1e3, 3) for timing in growth],
        "overlap_update_ms": round(found["update"].median * 1e3, 1),
        "cpuadam_gb_per_s": round(floor / 1e9, 2),
        "copy_gb_per_s": round(copy.bandwidth / 1e9, 2),
        "rows": args.rows,
        "width": args.width,
        "threads": args.threads,
        "repetitions": args.repetitions,
        "cores_busy_before_percent": busy,
        "quick": args.quick,
        "missed": [name for name, figure in figures.items() if not held(name, figure)],
    }
    print(json.dumps({**{name: round(figure, 3) for name, figure in figures.items()}, **extras}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
