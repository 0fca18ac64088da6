"""Runs DeepSpeed's own unit tests twice, with its engine and with ``MeftEngine`` without a block, and compares them.

Usage: ``python -m tests.deepspeed_suite.run path/to/a/DeepSpeed/checkout``. The checkout should be of the version that
is installed. Its tests are copied to a temporary folder, so that the installed DeepSpeed is tested, not the checkout's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

from tests.deepspeed_suite.topics import TOPICS, all_tests, topic_of

ENGINES = ("DeepSpeedEngine", "MeftEngine")
# How often a test is repeated with DeepSpeed's engine that passed with it and not with ours, and how many at most.
REPETITIONS = 3
MAX_REPEATED = 10
REPOSITORY = Path(__file__).parents[2]


def main() -> int:
    """Run and compare; the exit status is 0 where nothing that passes with DeepSpeed fails with MEFT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a git checkout of DeepSpeed")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that either run may take")
    parser.add_argument("-k", dest="keyword", help="only tests that match, as in pytest")
    arguments = parser.parse_args()
    # What ends this process is to end the tests' processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not (arguments.checkout / "tests" / "unit" / "checkpoint").is_dir():
        parser.error(f"checkout = {arguments.checkout} has no tests/unit/checkpoint; give a git checkout of DeepSpeed")
    locks = held_locks()
    if locks:
        parser.error(f"{locks[0]} exists, for which DeepSpeed would wait forever; if nothing is compiling, remove it")
    print(versions(arguments.checkout))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(arguments.checkout / "tests", folder / "tests")
        selection = all_tests() + (["-k", arguments.keyword] if arguments.keyword else [])
        runs = [run_tests(folder, engine, selection, arguments.timeout) for engine in ENGINES]
        plain, meft = (read_outcomes(results) for results in runs)
        built = {engine: read_engines(results) for engine, results in zip(ENGINES, runs, strict=True)}
        unstable = find_unstable(folder, suspects(plain, meft), arguments.timeout)

    print_table(plain, meft, built)
    for test in sorted(unstable):
        print(f"not compared: {test} does not always pass with DeepSpeedEngine either")
    stable = {test: outcome for test, outcome in plain.items() if test not in unstable}
    faults = compare(stable, meft, whole=arguments.keyword is None) + check_engines(built)
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def held_locks() -> list[Path]:
    """Locks of torch's extension loader on operators that DeepSpeed compiles; one that was left behind stays."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = Path(root).glob("*/lock") if root else Path.home().glob(".cache/torch_extensions/*/*/lock")
    return sorted(lock for lock in folders if lock.parent.name in ("cpu_adam", "fused_adam"))


def versions(checkout: Path) -> str:
    """One line that says which DeepSpeed is tested by which tests, and warns where they differ."""
    installed = metadata.version("deepspeed")
    file = checkout / "version.txt"
    of_tests = file.read_text().strip() if file.exists() else "an unknown version"
    line = f"DeepSpeed {installed}, tests of {of_tests}"
    if of_tests == installed:
        return line
    return f"{line}: tests may fail, with either engine, where the versions differ; check out v{installed} to avoid it"


def find_unstable(folder: Path, tests: list[str], timeout: float) -> set[str]:
    """Which of ``tests`` fail with DeepSpeed's engine too if they are repeated; many at once are not by chance."""
    unstable: set[str] = set()
    if 0 < len(tests) <= MAX_REPEATED:
        for _ in range(REPETITIONS):
            again = read_outcomes(run_tests(folder, "DeepSpeedEngine", tests, timeout))
            unstable |= {test for test in tests if again.get(test) == "failed"}
    return unstable


def run_tests(folder: Path, engine: str, selection: list[str], timeout: float) -> Path:
    """Run tests of ``folder/tests`` with ``engine``; returns the folder with what the plugin noted.

    Args:
        selection: ids of tests, and pytest's options to choose among them. timeout: in seconds.
    """
    results = Path(tempfile.mkdtemp(prefix=engine, dir=folder))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        # How many devices a CPU counts as; a test that needs more is skipped.
        "LOCAL_SIZE": "4",
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": "300",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "SUITE_ENGINE": engine,
        "SUITE_RESULTS": str(results),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.deepspeed_suite.plugin", "-p", "no:cacheprovider"]
    # In the same order both times: pytest-randomly comes with DeepSpeed's requirements for development.
    command += ["-p", "no:randomly", "-p", "no:warnings", "--tb", "short", "--basetemp", str(results / "tmp")]
    print(f"== {engine}", flush=True)
    # In a process group of its own: a test that hangs leaves processes behind.
    child = subprocess.Popen([*command, *selection], cwd=folder / "tests", env=environment, start_new_session=True)
    try:
        child.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        print(f"{engine}: not done after {timeout:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return results


def read_outcomes(results: Path) -> dict[str, str]:
    """Of each test ``passed``, ``failed`` or ``skipped``; empty if the run did not get so far."""
    file = results / "outcomes.json"
    return json.loads(file.read_text()) if file.exists() else {}


def read_engines(results: Path) -> Counter[str]:
    """How many engines of which class were built."""
    file = results / "engines.txt"
    return Counter(file.read_text().split()) if file.exists() else Counter()


def suspects(plain: dict[str, str], meft: dict[str, str]) -> list[str]:
    """Tests that passed with DeepSpeed's engine and did not pass with ours."""
    return [test for test, outcome in plain.items() if outcome == "passed" and meft.get(test) != "passed"]


def compare(plain: dict[str, str], meft: dict[str, str], *, whole: bool = True) -> list[str]:
    """What speaks against ``MeftEngine``, a sentence each; none if it passes whatever passes with DeepSpeed's engine.

    Args:
        whole: every topic was run, and needs a test that passes.
    """
    faults = [
        f"{test} passes with DeepSpeedEngine and not with MeftEngine ({meft.get(test, 'not run')})"
        for test in suspects(plain, meft)
    ]
    passed = [test for test, outcome in plain.items() if outcome == "passed"]
    if not passed:
        faults.append("no test passes with DeepSpeedEngine, so nothing was compared")
    elif whole:
        missing = TOPICS.keys() - {topic_of(test) for test in passed}
        faults += [f"no test about {topic} passes with DeepSpeedEngine" for topic in sorted(missing)]
    return faults


def check_engines(built: dict[str, Counter[str]]) -> list[str]:
    """Whether each run built the engine that it was about, and only that."""
    return [
        f"the run with {engine} built {count} × {other}"
        for engine in ENGINES
        for other in ENGINES
        if ((count := built[engine][other]) == 0) == (engine == other)
    ]


def print_table(plain: dict[str, str], meft: dict[str, str], built: dict[str, Counter[str]]) -> None:
    """Counts by topic and run, and the tests whose outcomes differ or are not ``passed``."""
    print(f"\n{'topic':24}{'':10}" + "".join(f"{engine:>18}" for engine in ENGINES))
    for topic in TOPICS:
        for outcome in ("passed", "failed", "skipped"):
            counts = [sum(topic_of(t) == topic and o == outcome for t, o in run.items()) for run in (plain, meft)]
            print(f"{topic:24}{outcome:10}" + "".join(f"{count:18}" for count in counts))
    for test in sorted({*plain, *meft}):
        pair = plain.get(test, "not run"), meft.get(test, "not run")
        if pair != ("passed", "passed"):
            print(f"{pair[0]:>8} / {pair[1]:8} {test}")
    print("engines built: " + "; ".join(f"{engine}: {dict(built[engine])}" for engine in ENGINES))


if __name__ == "__main__":
    sys.exit(main())
