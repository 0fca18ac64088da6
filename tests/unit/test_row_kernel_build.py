"""What becomes of the row kernels where they cannot, or shall not, be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import meft_engine
from meft_kernels.cpu import build

FIVE_STEPS = """
import hashlib, json, logging, torch

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append((record.levelname, record.getMessage()))
logging.getLogger("meft_engine").addHandler(Keep())

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_kernels.dispatch import row_passes

torch.manual_seed(3)
digest = hashlib.sha256()
for mode in ("lazy", "dense_equivalent"):
    for dtype in (torch.float32, torch.bfloat16):
        table = PartiallyOffloadedTensor("t", 41, 45, device="cpu", compute_dtype=dtype, resident=False, threads=2)
        table.fill(torch.randn(41, 45))
        optimizer = SparseCPUAdam([table], lr=0.01, weight_decay=0.1, mode=mode, moments_dtype=dtype, threads=2)
        for _ in range(5):
            for _ in range(2):
                rows = torch.randperm(41)[:17].sort().values
                table.accumulate(rows, torch.randn(17, 45))
            optimizer.step(grad_scale=0.7)
            digest.update(repr(round(optimizer.gradient_norm(), 6)).encode())
            optimizer.zero_grad()
        for x in (table.master, table.gather(torch.arange(41)), *optimizer.state[table.handle].values()):
            digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(json.dumps([row_passes().__name__, digest.hexdigest(), records]))
"""


def five_steps(**environment: str) -> tuple[str, str, list]:
    """Which passes served, a digest of all results, and what was logged, in a process of its own."""
    root = os.path.dirname(os.path.dirname(meft_engine.__file__))
    clean = {key: value for key, value in os.environ.items() if key != "MEFT_CPU_BUILD"}
    done = subprocess.run(
        [sys.executable, "-c", FIVE_STEPS],
        env={**clean, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def chosen(compiled_passes) -> tuple[str, str, list]:
    return five_steps()


def test_compiled_kernels_serve_where_there_is_a_compiler(chosen):
    assert chosen[0] == "meft_kernels.cpu.native_rows" and chosen[2] == []


def test_those_for_any_machine_give_the_same_bits(chosen):
    assert five_steps(MEFT_CPU_BUILD="portable") == chosen


def test_pytorch_serves_in_silence_where_it_is_asked_for(chosen):
    assert five_steps(MEFT_CPU_BUILD="none") == ("meft_kernels.rows", chosen[1], [])


def test_pytorch_serves_after_one_warning_where_there_is_no_compiler(chosen, tmp_path):
    module, digest, records = five_steps(CXX="/nonexistent/c++", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert (module, digest) == ("meft_kernels.rows", chosen[1])
    assert [level for level, _ in records] == ["WARNING"]
    assert "could not be compiled" in records[0][1] and "C++17 compiler" in records[0][1] and "\n" not in records[0][1]


@pytest.mark.parametrize("name", ["", "avx", "NATIVE"])
def test_an_unknown_build_is_refused(monkeypatch, name):
    monkeypatch.setenv("MEFT_CPU_BUILD", name)
    with pytest.raises(ValueError, match=rf'MEFT_CPU_BUILD = "{name}" is none of "native", "portable" and "none"'):
        build.library.__wrapped__()
