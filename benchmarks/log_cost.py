"""What the log of a run costs: processor time of the training thread, of a reading's record and of a closer look.

python benchmarks/log_cost.py [--layers 30] [--rows 8192] [--num_experts 256]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPEATS = 15


def build(layers: int, rows: int, num_experts: int, folder: Path) -> Any:
    """An engine over a narrow model: neither what is recorded nor what is read depends on the width."""
    import meft_engine

    size = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "meft": {
            "adapter": {"rows": rows, "num_experts": num_experts, "init_keys": "random"},
            "monitor": {"folder": str(folder), "interval": 10**9},
        },
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=layers, **size)).train()
    return meft_engine.initialize(model=model, config=config)[0]


def milliseconds(engine: Any, record: Callable[[], None]) -> float:
    """The median of some records, each after a step of training, in milliseconds of this thread."""
    found = []
    for seed in range(REPEATS):
        ids = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(seed)).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        started = time.thread_time()
        record()
        found.append(1e3 * (time.thread_time() - started))
    return statistics.median(found)


def measure(layers: int, rows: int, num_experts: int) -> dict[str, float]:
    """Milliseconds of a ``step`` record, of a ``layers`` and a ``memory`` record, and of both by step of training."""
    with tempfile.TemporaryDirectory() as folder:
        engine = build(layers, rows, num_experts, Path(folder))
        recorder, window = engine._watch.recorder, engine._watch._window
        record = milliseconds(engine, lambda: recorder._step(window.read()))
        reading = milliseconds(engine, window.read)
        look = milliseconds(engine, recorder._look_closely)
        engine.destroy()
    from meft_engine.config import MonitorConfig
    from meft_engine.recorder import READINGS_PER_LAYERS

    record -= reading
    a_step = (record + look / READINGS_PER_LAYERS) / MonitorConfig().interval
    return {"a step's record": record, "a closer look": look, "a step of training": a_step}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--num_experts", type=int, default=256)
    found = measure(**vars(parser.parse_args(argv)))
    print(", ".join(f"{name}: {value:.2f} ms" for name, value in found.items()))
    return found


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    os.environ.update(alone, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    main()
