"""How much memory there is where a container, a job or a shell allows less than the machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meft_engine.adapter.attach import attach
from meft_engine.config import MeftConfig, MeftConfigError
from meft_engine.planner import host_limit, limits, require_device_memory, require_host_memory
from tests.families import tiny_config, tiny_llama

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GIB))


def system(root: Path, cgroups: str, files: dict[str, object]) -> Path:
    for name, text in {"proc/self/cgroup": cgroups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def test_the_machine_alone(tmp_path):
    assert host_limit(tmp_path).bytes == 100 * GIB and not host_limit(tmp_path).source
    unlimited = system(tmp_path, "0::/job\n", {"sys/fs/cgroup/job/memory.max": "max"})
    assert host_limit(unlimited).bytes == 100 * GIB


def test_a_cgroup_of_the_second_version(tmp_path):
    """What is taken does not count twice, and page cache is given back."""
    job = "sys/fs/cgroup/slice/job/"
    stat = f"anon {5 * GIB}\ninactive_file {GIB}\nactive_file {2 * GIB}\nshmem 7\n"
    files = {f"{job}memory.max": 16 * GIB, f"{job}memory.current": 10 * GIB, f"{job}memory.stat": stat}
    found = host_limit(system(tmp_path, "0::/slice/job\n", files))
    assert found.bytes == (16 - 10 + 3) * GIB
    assert "9.0 GiB are available" in str(found) and "16.0" in str(found) and "cgroup" in str(found)


def test_a_cgroup_around_it_counts_too(tmp_path):
    files = {
        "sys/fs/cgroup/slice/job/memory.max": 16 * GIB,
        "sys/fs/cgroup/slice/job/memory.current": 0,
        "sys/fs/cgroup/slice/memory.max": 3 * GIB,
        "sys/fs/cgroup/slice/memory.current": GIB,
    }
    assert host_limit(system(tmp_path, "0::/slice/job\n", files)).bytes == 2 * GIB


def test_a_cgroup_of_the_first_version_whose_path_is_the_hosts(tmp_path):
    """Inside a container only the mount itself is there; without a limit the file holds a number near 2**63."""
    memory = "sys/fs/cgroup/memory/"
    lines = "12:cpu:/docker/1\n4:memory:/docker/1\n0::/\n"
    files = {
        f"{memory}memory.limit_in_bytes": 4 * GIB,
        f"{memory}memory.usage_in_bytes": 2 * GIB,
        f"{memory}memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n",
    }
    assert host_limit(system(tmp_path, lines, files)).bytes == 2.5 * GIB
    (tmp_path / f"{memory}memory.limit_in_bytes").write_text("9223372036854771712")
    assert host_limit(tmp_path).bytes == 100 * GIB


def test_a_process_over_its_limit_has_nothing_left(tmp_path):
    files = {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}
    assert host_limit(system(tmp_path, "0::/\n", files)).bytes == 0


def test_the_refusal_says_whose_limit_it_is(monkeypatch):
    monkeypatch.setattr(limits, "host_limit", lambda: limits.Limit(4 * GIB, "left of RLIMIT_AS, see ulimit -v"))
    block = MeftConfig.from_block({"adapter": {"rows": 8192}})
    require_host_memory(4 * GIB, block, 2)
    with pytest.raises(MeftConfigError) as raised:
        require_host_memory(8 * GIB, block, 2)
    assert str(raised.value) == (
        "adapter.rows = 8192 in 2 layers needs 8.0 GiB of host memory, and 4.0 GiB are available (left of RLIMIT_AS, "
        "see ulimit -v); at most about 4096 rows would fit"
    )


def test_a_device_that_is_too_small_is_refused_by_kind(monkeypatch):
    monkeypatch.setattr(limits, "device_limit", lambda device: limits.Limit(3 * GIB, "of the 4.0 GiB of a card"))
    block = MeftConfig.from_block({})
    require_device_memory({"base": GIB, "keys": 2 * GIB}, block, 2, "cuda")
    with pytest.raises(MeftConfigError) as raised:
        require_device_memory({"base": GIB, "keys": 2 * GIB, "hot_rows": 1, "slots": 0}, block, 2, "cuda")
    message = str(raised.value)
    assert "base 1.0, keys 2.0, hot rows 0.0" in message and "slots" not in message
    assert "of the 4.0 GiB of a card" in message and "\n" not in message
    monkeypatch.setattr(limits, "device_limit", lambda device: None)
    require_device_memory({"base": 1 << 60}, block, 2, "cpu")


def test_attaching_to_a_model_looks_at_the_device_before_it_allocates(monkeypatch):
    """Keys and routers of all layers, and what of the base is yet to come there."""
    model, block = tiny_llama(), tiny_config({"rows": 3500})
    keys = 3 * 3500 * 32 * 4
    monkeypatch.setattr(limits, "device_limit", lambda device: limits.Limit(4 * keys, "of a card"))
    monkeypatch.setattr("meft_engine.adapter.attach.PartiallyOffloadedTensor", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(MeftConfigError, match=r"of device memory before any activation \(base .*, keys .*of a card"):
        attach(model, block, compute_dtype=torch.float32, base_to_come=4 * keys)
    monkeypatch.undo()
    monkeypatch.setattr(limits, "device_limit", lambda device: limits.Limit(4 * keys, "of a card"))
    attach(model, block, compute_dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced by Linux")
def test_an_engine_under_a_memory_limit_is_refused_with_the_numbers_before_it_allocates():
    """Under ``ulimit -v``, in a process of its own, long before ten seconds are over."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.scripts.limited"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Who says what is left: the limit, or a machine of which others have taken more.
    assert "adapter.rows = 1048576 in 2 layers needs 12.0 GiB" in found["message"]
    assert "GiB are available" in found["message"]
    assert 0 < found["fitting"] < 1 << 20
    assert found["seconds"] < 10 and found["grown"] < GIB // 2
