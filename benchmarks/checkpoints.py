"""What saving, loading and exporting take: seconds beside their floor, memory beside what was there, and how long
training stands still.

One engine trains 4 GB of rows in one layer, with fp32 moments (12 GB in all), on this machine's disk. The last line is
one JSON object. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WIDTH, VOCAB = 4096, 64
# What each figure may be at most; memory in MB (10^6 bytes). snapshot_bytes are there before a save begins.
TARGETS = {
    "async_blocked_share": 0.15,
    "save_peak_mb": 256,
    "async_save_peak_mb": 256,
    "load_peak_mb": 256,
    "export_peak_mb": 256,
}


def main() -> None:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="of each of the two tables, 4096 wide; 131,072 if not given")
    parser.add_argument("--folder", help="where checkpoints go; default: a temporary folder beside the results")
    parser.add_argument("--snapshot_bytes", type=int, default=4 << 30, help="for the save in the background")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="few rows, into runs/bench: does it run?")
    arguments = parser.parse_args()
    rows, out = (4096, HERE.parent / "runs" / "bench") if arguments.quick else (131_072, HERE / "results")
    place = tempfile.TemporaryDirectory(prefix="meft-checkpoints-", dir=arguments.folder)
    with place as folder:
        figures = measure(arguments.rows or rows, Path(folder), arguments.snapshot_bytes)
    missed = [name for name, most in TARGETS.items() if figures[name] > most]
    write(figures, arguments.out or out)
    show(figures)
    print(f"missed: {', '.join(missed)}" if missed else "every target is reached")
    print(json.dumps(figures))


def measure(rows: int, folder: Path, budget: int) -> dict[str, float]:
    """All figures; seconds, MB, shares."""
    engine = build(rows, {"async_save": False})
    step = stepper(engine)
    for number in range(3):
        step(number)
    figures: dict[str, float] = {"rows_mb": engine.meft_report()["host_bytes"] / 1e6}
    figures["disk_mb_s"], figures["sha256_mb_s"] = disk_speed(folder), hash_speed()

    with peak() as found:
        figures["save_seconds"] = timed(lambda: engine.save_checkpoint(str(folder / "at_once")))
    figures["save_peak_mb"] = found.megabytes
    # The file is summed while it is written.
    figures["save_floor_seconds"] = figures["rows_mb"] / min(figures["disk_mb_s"], figures["sha256_mb_s"])
    with peak() as found:
        figures["export_seconds"] = timed(lambda: engine.save_adapter(folder / "exported"))
    figures["export_peak_mb"] = found.megabytes
    shutil.rmtree(folder / "exported")
    with peak() as found:
        figures["load_seconds"] = timed(lambda: engine.load_checkpoint(str(folder / "at_once")))
    figures["load_peak_mb"] = found.megabytes
    shutil.rmtree(folder / "at_once")
    usual = [timed(lambda: step(number)) for number in range(3, 9)]  # noqa: B023
    engine.destroy()
    del engine, step
    gc.collect()

    engine = build(rows, {"async_save": True, "snapshot_bytes": budget})
    step = stepper(engine)
    for number in range(3):
        step(number)
    waited = waiting_in_updates()
    with peak() as training:
        for number in range(3):
            step(number)
    with peak() as found:
        blocked = timed(lambda: engine.save_checkpoint(str(folder / "beside")))
        beside = []
        while not beside or engine._saver._thread.is_alive():
            beside.append(timed(lambda: step(3 + len(beside))))
        snapshot_mb = engine._saver.most_copied / 1e6
        engine._saver.finish()
    figures["async_call_seconds"], figures["async_wait_seconds"] = blocked, waited()
    figures["async_blocked_share"] = (blocked + waited()) / figures["save_seconds"]
    figures["async_save_peak_mb"] = found.megabytes - training.megabytes
    figures["async_snapshot_mb"] = snapshot_mb
    figures["async_total_seconds"] = blocked + sum(beside)
    figures["step_seconds"] = float(np.median(usual))
    figures["step_seconds_beside_a_save"] = float(np.median(beside))
    engine.destroy()
    return {name: round(value, 4) for name, value in figures.items()}


def build(rows: int, checkpoint: dict[str, Any]) -> Any:
    """An engine over one tiny-vocabulary layer of a wide model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import meft_engine

    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=1,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "meft": {
            "adapter": {"rows": rows, "num_experts": 1024, "init_keys": "random"},
            "checkpoint": checkpoint,
        },
    }
    return meft_engine.initialize(model=model, config=config)[0]


def stepper(engine: Any) -> Callable[[int], None]:
    """Takes one optimizer step on sentences of a number."""

    def step(number: int) -> None:
        ids = torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(number)).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step


class Peak:
    """Most anonymous memory of this process while it is watched, beyond what there was before; MB.

    Pages of mapped files are not counted: the system takes them back whenever it likes.
    """

    megabytes = 0.0


@contextmanager
def peak() -> Iterator[Peak]:
    """Watches memory every two milliseconds."""
    gc.collect()
    found, done, before = Peak(), threading.Event(), anonymous()

    def watch() -> None:
        while not done.wait(0.002):
            found.megabytes = max(found.megabytes, (anonymous() - before) / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def anonymous() -> int:
    """Resident bytes that no file backs."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def waiting_in_updates() -> Callable[[], float]:
    """Seconds that updates spend on copies of rows and in waiting for room for them, from now on."""
    from meft_engine.offload.tensor import PartiallyOffloadedTensor

    original, total = PartiallyOffloadedTensor.about_to_change, [0.0]

    def about_to_change(*arguments: Any) -> None:
        began = time.perf_counter()
        original(*arguments)
        total[0] += time.perf_counter() - began

    PartiallyOffloadedTensor.about_to_change = about_to_change
    return lambda: total[0]


def disk_speed(folder: Path, size: int = 1 << 30) -> float:
    """MB a second that one file is written with, down to the disk."""
    piece = os.urandom(1 << 24)
    path = folder / "speed"
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / 1e6 / seconds


def hash_speed(size: int = 1 << 28) -> float:
    """MB a second of SHA-256."""
    import hashlib

    data = bytes(size)
    return size / 1e6 / timed(lambda: hashlib.sha256(data))


def timed(do: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def show(figures: dict[str, float]) -> None:
    """A table for people."""
    table = Table("figure", "", "at most", title="saving, loading and exporting")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}", f"{TARGETS[name]:,}" if name in TARGETS else "")
    Console(width=120).print(table)


def write(figures: dict[str, float], folder: Path) -> None:
    """As a CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "checkpoints.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "value", "at most"])
        writer.writerows([name, value, TARGETS.get(name, "")] for name, value in figures.items())


if __name__ == "__main__":
    if psutil.cpu_percent(interval=0.5) > 20:
        print("WARNING: other work keeps the cores busy; seconds are too long", file=sys.stderr)
    main()
