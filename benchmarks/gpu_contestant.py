"""A model of seven billion parameters with one way to train it, in a process of its own.

``gpu_contestant.py '{"method": "meft", …}'`` takes steps with each number of accumulated micro-batches and prints one
JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_machine import the_device
from gpu_marks import CAPPED_BYTES, WHOLE_LAYERS
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "ds_configs" / "meft_24gb.json"
sys.path.insert(0, str(ROOT / "launch"))


@dataclass(frozen=True)
class Shape:
    """Of a Llama and its adapters, and of a micro-batch."""

    width: int = 4096
    heads: int = 32
    inner: int = 11008
    vocabulary: int = 32000
    rows: int = 16384
    sequences: int = 2
    length: int = 256

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.length


TINY = Shape(width=64, heads=4, inner=128, vocabulary=128, rows=64, length=16)


@dataclass(frozen=True)
class Contestant:
    """What is trained, and how.

    ``method``: ``base`` (frozen: forward, and backward to the inputs), ``lora``, ``meft``, or ``dense`` (all rows,
    under ZeRO stage 2 with ``offload_optimizer``). ``accumulations``: micro-batches to a step, of which each is
    measured over ``steps`` steps. ``moments``: the precision of MEFT's. ``capped``: to 24 GiB of the card's memory.
    """

    method: str
    accumulations: tuple[int, ...] = (8, 32)
    steps: int = 3
    max_staleness: int = 0
    moments: str = "fp32"
    capped: bool = False
    layers: int = WHOLE_LAYERS
    tiny: bool = False

    @property
    def shape(self) -> Shape:
        """Of its model."""
        return TINY if self.tiny else Shape()

    def host_bytes(self) -> int:
        """Of the host's memory that it needs for what grows with the adapter."""
        elements = self.layers * 2 * self.shape.rows * self.shape.width
        if self.method == "meft":
            # Two planes of two bytes, two moments, and the gradients of a window in which every row is touched.
            return elements * (4 + 2 * (4 if self.moments == "fp32" else 2) + 4)
        if self.method == "dense":
            # Master, gradient and two moments in fp32; the window's gradients, and what goes back, in bf16.
            return elements * (4 * 4 + 2 + 2)
        return 0


def build_model(contestant: Contestant, device: torch.device) -> nn.Module:
    """A frozen Llama of random weights, the same in every process, built where it computes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = contestant.shape
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=contestant.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if contestant.tiny else torch.bfloat16)
    return model.train().requires_grad_(False)


def configuration(contestant: Contestant) -> dict[str, Any]:
    """DeepSpeed's: that of ``ds_configs/meft_24gb.json``, with what the contestant has in its place."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config["train_micro_batch_size_per_gpu"] = contestant.shape.sequences
    config["gradient_accumulation_steps"] = contestant.accumulations[0]
    config["bf16"]["enabled"] = not contestant.tiny
    config["steps_per_print"] = 10**9
    block = config.pop("meft")
    if contestant.method == "meft":
        block["adapter"]["rows"] = contestant.shape.rows
        ours = {"max_staleness": contestant.max_staleness, "moments_dtype": contestant.moments}
        block["optimizer"] = block.get("optimizer", {}) | ours
        if contestant.tiny:
            block["offload"]["compute_dtype"] = "fp32"
        config["meft"] = block
    if contestant.method == "dense":
        place = {"device": "cpu", "pin_memory": not contestant.tiny}
        config["zero_optimization"] = {"stage": 2, "offload_optimizer": place}
        # DeepSpeedCPUAdam, which takes a minute to compile.
        config["optimizer"]["params"]["torch_adam"] = contestant.tiny
    return config


def build_engine(contestant: Contestant, model: nn.Module) -> Any:
    """The engine that trains what the contestant adds to the model."""
    import deepspeed
    from step_contestant import add_dense, add_lora

    import meft_engine

    # An all_reduce over shared memory, which CPUs have, takes minutes to compile, and one rank never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if contestant.method == "lora":
        model = add_lora(model)
    elif contestant.method == "dense":
        model = add_dense(model, contestant.shape.rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = configuration(contestant)
    return meft_engine.initialize(model=model, config=config, model_parameters=trained or None)[0]


class Run:
    """A contestant's model, and its engine where something is trained."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant, self._device, self._number = contestant, the_device(), 0
        self._model = build_model(contestant, self._device)
        self._engine = None if contestant.method == "base" else build_engine(contestant, self._model)

    def figures(self) -> dict[str, Any]:
        """What :meth:`_measure` finds with each number of accumulated micro-batches, memory, and what was touched."""
        windows = {str(count): self._measure(count) for count in self._contestant.accumulations}
        report = self._report()
        return {
            "windows": windows,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if self._device.type == "cuda" else None,
            "host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
            **{name: report[name] for name in ("touched_share", "kept_mass", "stale_reads") if name in report},
        }

    def close(self) -> None:
        """Give back what the engine holds."""
        if self._engine is not None:
            self._engine.destroy()

    def _measure(self, accumulation: int) -> dict[str, Any]:
        """Of a step: seconds and tokens a second, and the differences of :meth:`_counters`."""
        c = self._contestant
        if self._engine is not None:
            self._engine.set_train_batch_size(accumulation * c.shape.sequences)
        self._step(accumulation)  # compiles, allocates
        self._finish()
        before = self._counters()
        began = time.perf_counter()
        for _ in range(c.steps):
            self._step(accumulation)
        self._finish()
        seconds = (time.perf_counter() - began) / c.steps
        found = {name: (value - before.get(name, 0)) / c.steps for name, value in self._counters().items()}
        phases = {name.partition("/")[2]: found.pop(name) for name in list(found) if name.startswith("phase/")}
        speed = round(accumulation * c.shape.tokens / seconds, 2)
        return {
            "seconds": round(seconds, 5),
            "tokens_per_second": speed,
            **{name: round(value) for name, value in found.items()},
            "phases": {name: round(value, 5) for name, value in phases.items()},
        }

    def _step(self, accumulation: int) -> None:
        """As many micro-batches as a step takes; a first one may begin in the middle of what was set before."""
        if self._engine is None:
            for _ in range(accumulation):
                ids = self._next_batch()
                inputs = self._model.get_input_embeddings()(ids).requires_grad_()
                self._model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
            return
        done = self._engine.global_steps
        while self._engine.global_steps == done:
            ids = self._next_batch()
            self._engine.backward(self._engine(input_ids=ids, labels=ids, use_cache=False).loss)
            self._engine.step()

    def _next_batch(self) -> Tensor:
        """[sequences, length] int64 of random tokens, which touch more rows than text does."""
        shape = self._contestant.shape
        generator = torch.Generator().manual_seed(self._number)
        self._number += 1
        return torch.randint(shape.vocabulary, (shape.sequences, shape.length), generator=generator).to(self._device)

    def _finish(self) -> None:
        """What a step leaves to be done later is done."""
        if self._contestant.method == "meft":
            self._engine.synchronize_rows()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _report(self) -> dict[str, Any]:
        return self._engine.meft_report() if self._contestant.method == "meft" else {}

    def _counters(self) -> dict[str, float]:
        """Of MEFT, all so far: updates of rows, bytes over the bus, rows that were on the device, seconds by phase."""
        if self._contestant.method != "meft":
            return {}
        updates = sum(int(state["step"].sum()) for state in self._engine.row_optimizer.state.values())
        phases = {f"phase/{name}": seconds for name, seconds in self._engine.phases.seconds().items()}
        return {"touched_rows": updates, **(self._report().get("traffic") or {}), **phases}


def main() -> None:
    """See the top of this file."""
    given = json.loads(sys.argv[1])
    contestant = Contestant(**given | {"accumulations": tuple(given["accumulations"])})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port}
    os.environ.update(alone, HF_HUB_OFFLINE="1", DS_ACCELERATOR=the_device().type)
    if contestant.capped and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAPPED_BYTES / total))
    try:
        run = Run(contestant)
        figures = run.figures()
        run.close()
    except torch.cuda.OutOfMemoryError as error:
        figures = {"out_of_memory": True, "said": str(error).partition(". ")[0]}
    print(json.dumps(dataclasses.asdict(contestant) | figures))


if __name__ == "__main__":
    main()
