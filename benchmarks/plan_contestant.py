"""One run of benchmarks/plan.py, in a process of its own: trains a few steps and prints what they took.

python benchmarks/plan_contestant.py NUMBER MODEL STEPS host|device
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Command line, see the top of this file. Each step waits for a line on stdin."""
    from plan import CASES, READY, TINY

    number, model, steps, place = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    case = [*CASES, *TINY][number]
    join_alone()
    if place == "device":
        from _pytest.monkeypatch import MonkeyPatch

        from tests.late_copies import use_late_device

        use_late_device(MonkeyPatch().setattr)
    import meft_engine

    network = load(model, torch.bfloat16 if case.bf16 else torch.float32)
    if case.checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    engine = meft_engine.initialize(model=network, config=case.config())[0]
    text, at, seconds = tokens(model, network.config.vocab_size), 0, []
    for _ in range(steps + 1):
        print(READY, flush=True)
        sys.stdin.readline()
        before = engine.phases.seconds()
        began = time.perf_counter()
        for _ in range(case.accumulation):
            ids = text[at : at + case.sequences * case.length].view(case.sequences, case.length)
            at = (at + ids.numel()) % (len(text) - 2 * ids.numel())
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
        engine.synchronize_rows()
        seconds.append(time.perf_counter() - began)
    phases = {name: total - before.get(name, 0.0) for name, total in engine.phases.seconds().items()}
    report = engine.meft_report()
    found: dict[str, Any] = {
        "host_rows": report["host_bytes_measured"],
        "host_peak": peak(),
        "step": statistics.median(seconds[1:] or seconds),
        "touched_share": report["touched_share"],
        "by_kind": report["device_bytes_by_kind"],
        "phases_ms": {name: round(value * 1e3, 1) for name, value in phases.items()},
    }
    engine.destroy()
    print(json.dumps(found))


def join_alone() -> None:
    """What DeepSpeed needs to run with one rank on a CPU."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ.update(alone, MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    import deepspeed

    # An all_reduce over shared memory takes minutes to compile, and one rank never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load(model: str, dtype: torch.dtype) -> torch.nn.Module:
    """As scripts do."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).train()


def tokens(model: str, vocabulary: int) -> torch.Tensor:
    """[n] int64: of a text, or drawn for a model that has no tokenizer, unevenly as words are."""
    if (Path(model) / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        text = (HERE / "learning" / "text.txt").read_text(encoding="utf-8")
        return torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    weights = 1 / torch.arange(3, vocabulary + 3, dtype=torch.float64)
    return torch.multinomial(weights, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))


def peak() -> int:
    """Bytes that were resident at the worst moment of this process; getrusage would count its parent's too."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
