"""What the comparison of two runs of DeepSpeed's tests lets pass and what not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

from meft_engine.engine import MeftEngine
from tests.deepspeed_suite import run
from tests.deepspeed_suite.run import MAX_REPEATED, check_engines, compare, find_unstable
from tests.deepspeed_suite.topics import TOPICS, all_tests, topic_of

RUN = {f"{tests[0]}::test": "passed" for tests in TOPICS.values()}
TEST = next(iter(RUN))


def test_equal_runs_have_no_fault() -> None:
    assert compare(RUN, dict(RUN)) == []
    assert compare({**RUN, "unit/other.py::test": "failed"}, {**RUN, "unit/other.py::test": "failed"}) == []


@pytest.mark.parametrize("outcome", ["failed", "skipped", None])
def test_what_passes_with_deepspeed_alone_is_a_fault(outcome: str | None) -> None:
    meft = {test: result for test, result in RUN.items() if test != TEST} | ({TEST: outcome} if outcome else {})
    (fault,) = compare(RUN, meft)
    assert TEST in fault


def test_a_run_without_passing_tests_is_a_fault() -> None:
    assert "nothing was compared" in compare({}, {})[0]
    assert "nothing was compared" in compare(dict.fromkeys(RUN, "skipped"), dict.fromkeys(RUN, "skipped"))[0]


def test_every_topic_needs_a_passing_test() -> None:
    without = {**RUN, TEST: "failed"}
    (fault,) = compare(without, without)
    assert topic_of(TEST) in fault
    assert compare(without, without, whole=False) == []


def test_each_run_builds_its_own_engine_alone() -> None:
    good = {"DeepSpeedEngine": Counter(DeepSpeedEngine=3), "MeftEngine": Counter(MeftEngine=3, PipelineEngine=1)}
    assert check_engines(good) == []
    assert len(check_engines({**good, "MeftEngine": Counter(DeepSpeedEngine=3)})) == 2
    assert len(check_engines({**good, "MeftEngine": Counter()})) == 1
    assert len(check_engines({**good, "DeepSpeedEngine": Counter(DeepSpeedEngine=1, MeftEngine=1)})) == 1


def test_only_what_fails_with_deepspeed_when_repeated_is_unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    repetitions = iter([{"a": "passed", "b": "passed"}, {"a": "failed", "b": "passed"}, {"a": "passed", "b": "passed"}])
    engines: list[str] = []
    monkeypatch.setattr(run, "run_tests", lambda folder, engine, tests, timeout: engines.append(engine))
    monkeypatch.setattr(run, "read_outcomes", lambda results: next(repetitions))
    assert find_unstable(Path(), ["a", "b"], 1) == {"a"}
    assert engines == ["DeepSpeedEngine"] * 3


@pytest.mark.parametrize("count", [0, MAX_REPEATED + 1])
def test_nothing_is_repeated_where_none_or_many_differ(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_tests", lambda *arguments: pytest.fail("repeated"))
    assert find_unstable(Path(), [str(number) for number in range(count)], 1) == set()


def test_topics_are_told_apart_by_whole_names() -> None:
    assert topic_of("unit/checkpoint/test_zero_optimizer.py::TestZeROCheckpoint::test[1]") == "optimizer checkpoints"
    assert topic_of("unit/checkpoint/test_zero_optimizer.py::TestZeROCheckpointFrozenWeights::test") == "frozen weights"
    assert topic_of("unit/runtime/test_other.py::test") is None
    assert len(set(all_tests())) == len(all_tests())


def test_every_overridden_method_falls_back_without_a_block() -> None:
    overridden = {
        name
        for name, value in vars(MeftEngine).items()
        # By their own names: `zero.Init` leaves copies of `__init__` behind in every class.
        if callable(value) and name == value.__name__ != "__init__" and hasattr(DeepSpeedEngine, name)
    }
    unguarded = {name for name in overridden if not hasattr(vars(MeftEngine)[name], "__wrapped__")}
    assert len(overridden) >= 14
    assert not unguarded
