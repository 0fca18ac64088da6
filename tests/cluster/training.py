"""Starts ``scripts/train.py`` and reads what its ranks wrote down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import ROOT, plain_environment
from tests.families import tiny_block
from tests.integration.engines import ds_config
from tests.process_groups import free_port

TRAIN = Path(__file__).parent / "scripts" / "train.py"

BLOCKS = {"plain": None, "meft": tiny_block()}
"""Configurations by their names; without a block it is DeepSpeed that is tested, and the cluster itself."""

RANK_VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""What ranks on other hosts have to be given."""

ADOPT = """
import json, os, socket
from meft_engine.launchers import adopt_ranks
adopt_ranks()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps({"host": socket.gethostname(), **{name: os.environ.get(name) for name in names}}))
"""
"""A script that prints which rank it is."""


def adopted(output: str) -> list[dict[str, str]]:
    """What several :data:`ADOPT` printed, in the order of ranks."""
    # What ranks print at the same time may come on one line.
    found = [json.loads(text) for text in re.findall(r"\{.*?\}", output)]
    return sorted(found, key=lambda rank: rank["RANK"] or "")


def write_configs(folder: Path, **meft: Any) -> list[Path]:
    """``<name>.json`` for each of :data:`BLOCKS`; ``meft``: sections to add to the block."""
    paths = []
    for name, block in BLOCKS.items():
        # With a large eps, Adam's steps depend on how large gradients are: a sum in place of a mean is seen.
        config = ds_config(block if block is None else {**block, **meft}, adam={"eps": 1e-3})
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(config))
    return paths


def arguments(folder: Path, configs: Sequence[Path], **options: Any) -> list[str]:
    """The script and its arguments; results go to ``folder``, and ``options`` are the script's."""
    more = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str(TRAIN), "--folder", str(folder), "--configs", *map(str, configs), *more]


def write_deepspeed_env(folder: Path, **variables: str) -> None:
    """The file from which DeepSpeed's launcher, started in ``folder``, takes what ranks elsewhere get."""
    lines = [f"{name}={value}" for name, value in {**RANK_VARIABLES, **variables}.items()]
    (folder / ".deepspeed_env").write_text("\n".join(lines) + "\n")


def train_alone(folder: Path, configs: Sequence[Path], **options: Any) -> None:
    """Train in one process of this machine.

    Raises:
        AssertionError: with the end of its output, if it fails.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = plain_environment(**alone, MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "meft_engine.run", *arguments(folder, configs, **options)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    """What every rank wrote down of one configuration, in the order of ranks."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{name}.rank*.json")]
    return sorted(found, key=lambda result: result["rank"])


def mean_losses(found: Sequence[dict[str, Any]]) -> list[float]:
    """The loss of the global batch at every step: ranks have equal shares of it."""
    return [sum(losses) / len(losses) for losses in zip(*(result["losses"] for result in found), strict=True)]


def placement(found: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Host, local rank and ranks of the host, in the order of ranks."""
    return [(r["host"], r["variables"]["LOCAL_RANK"], r["variables"]["LOCAL_SIZE"]) for r in found]


def check_one_rank_a_host(folder: Path, name: str, alone: dict[str, list[float]]) -> None:
    """Two hosts with a rank each trained what one process trains."""
    found = results(folder, name)
    assert placement(found) == [("n1", "0", "1"), ("n2", "0", "1")]
    losses = mean_losses(found)
    assert losses == pytest.approx(alone[name][: len(losses)], abs=1e-5)
