"""The doctor: what it finds where something is amiss, and that it never falls ill itself."""

from __future__ import annotations

import json
import os
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

from meft_engine import doctor
from meft_engine.cli import main
from meft_engine.doctor import OK, PROBLEM, WARNING


def only(findings, topic: str) -> doctor.Finding:
    (found,) = (finding for finding in findings if finding.topic == topic)
    return found


def test_a_lock_that_was_left_behind_is_a_problem_with_its_remedy(tmp_path, monkeypatch):
    """DeepSpeed would wait for it forever; a fresh one may be another process's."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert only(doctor.stale_locks(), "compilation locks").state == OK
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert only(doctor.stale_locks(), "compilation lock").state == WARNING
    os.utime(lock, (time.time() - 7200,) * 2)
    found = only(doctor.stale_locks(), "compilation lock")
    assert found.state == PROBLEM and "120 minutes" in found.found and "cpu_adam" in found.found
    assert found.remedy == f"If nothing is being compiled, remove it: rm {lock}"


def test_a_lock_on_our_own_kernels_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "meft_native_1" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setattr("meft_kernels.cpu.build.library", lambda: pytest.fail("it would wait"))
    assert only(doctor.row_kernels(True), "row kernels").state == WARNING


def test_packages_are_held_against_the_ranges_of_the_project(monkeypatch):
    real = metadata.version
    assert {finding.state for finding in doctor.packages()} == {OK}

    def version(name: str) -> str:
        if name == "ninja":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    torch, ninja = (only(doctor.packages(), name) for name in ("torch", "ninja"))
    assert torch.state == PROBLEM and torch.found.startswith("0.1, and >=")
    assert ninja.state == PROBLEM and ninja.found == "is not installed" and "pip install 'ninja" in ninja.remedy


def test_without_a_compiler_it_says_what_that_costs(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    monkeypatch.delenv("CXX", raising=False)
    found = list(doctor.tools())
    assert only(found, "g++").state == WARNING and "more slowly" in only(found, "g++").remedy
    assert only(found, "ninja").state == WARNING


@pytest.mark.parametrize(
    ("flags", "state"), [("sse2 avx2 avx512f amx_bf16", OK), ("sse2 avx2", WARNING), ("sse2", WARNING), ("", WARNING)]
)
def test_a_cpu_that_emulates_bf16_is_said(flags, state, monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    found = only(doctor.cpu(), "CPU")
    assert found.state == state and ("AMX bf16" in found.found) == ("amx" in flags)


def test_a_limit_of_the_container_is_said(monkeypatch):
    from meft_engine.planner import limits

    monkeypatch.setattr(limits, "host_limit", lambda: limits.Limit(1 << 30, "left of RLIMIT_AS, see ulimit -v"))
    found = only(doctor.memory(), "host memory")
    assert found.state == WARNING and "1.0 GiB are available (left of RLIMIT_AS" in found.found
    assert "ulimit -v unlimited" in found.remedy


def test_small_shared_memory_is_said(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=60 << 20))
    found = only(doctor.shared_memory(), "/dev/shm")
    assert found.state == WARNING and "--shm-size" in found.remedy


def test_what_cannot_be_looked_at_is_said(monkeypatch):
    def numa():
        raise PermissionError("no")
        yield

    monkeypatch.setattr(doctor, "numa", numa)
    found = only(doctor.examine(build=False), "numa")
    assert found.state == WARNING and "could not be looked at (PermissionError: no)" in found.found


@pytest.mark.parametrize("state", [OK, PROBLEM])
def test_the_exit_code_and_the_output(state, monkeypatch, capsys):
    """Every finding has its state, and every one that is not ok a sentence to act on."""
    one = doctor.Finding("a [thing]", state, "found [/] it", "" if state == OK else "Do so.")
    monkeypatch.setattr(doctor, "examine", lambda build: iter([one]))
    monkeypatch.setattr(doctor, "ds_report", lambda: "op name [NO]")
    code = 1 if state == PROBLEM else 0
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["findings"][0] == vars(one)
    assert main(["doctor"]) == code
    text = capsys.readouterr().out
    assert "a [thing]" in text and "found [/] it" in text and "op name [NO]" in text


def test_this_machine_has_no_check_that_fails_to_run():
    """DeepSpeed's own report is part of it."""
    found = list(doctor.examine(build=False))
    assert not [finding for finding in found if "could not be looked at" in finding.found]
    assert all(finding.remedy for finding in found if finding.state == PROBLEM)
    assert "cpu_adam" in only(found, "DeepSpeed's operators").found
    assert "cpu_adam" in doctor.ds_report()
