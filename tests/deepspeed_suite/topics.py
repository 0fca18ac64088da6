"""Which of DeepSpeed's unit tests are run, by what they are about."""

from __future__ import annotations

_ZERO_CHECKPOINTS = "unit/checkpoint/test_zero_optimizer.py"

# Left out: tests with a DistributedFixture, which pytest 8.4 and later do not find; tests in spawned processes, which
# do not import the plugin; and those of learning rate schedules, all of which are skipped on a CPU.
TOPICS: dict[str, list[str]] = {
    "frozen weights": [
        f"{_ZERO_CHECKPOINTS}::TestZeROCheckpointFrozenWeights",
        "unit/v1/zero/test_zero.py::TestZeroFrozenWeights",
    ],
    "optimizer checkpoints": [
        f"{_ZERO_CHECKPOINTS}::TestZeROCheckpoint",
        f"{_ZERO_CHECKPOINTS}::TestZeROSaveLoadEdgeCase",
        f"{_ZERO_CHECKPOINTS}::TestSaveTensorClone",
        "unit/checkpoint/test_other_optimizer.py",
        "unit/checkpoint/test_shared_weights.py",
    ],
    "latest": ["unit/checkpoint/test_latest_checkpoint.py"],
    "tag validation": ["unit/checkpoint/test_tag_validation.py"],
}


def all_tests() -> list[str]:
    """What to hand to pytest, relative to the folder ``tests`` of a checkout."""
    return [test for tests in TOPICS.values() for test in tests]


def topic_of(test: str) -> str | None:
    """The topic that the id of a test, such as ``unit/file.py::Class::test[1]``, belongs to."""
    for topic, prefixes in TOPICS.items():
        if any(test == prefix or test.startswith(f"{prefix}::") for prefix in prefixes):
            return topic
    return None
