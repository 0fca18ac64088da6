"""A pytest plugin that has DeepSpeed's tests build one or the other engine, and notes their outcomes.

Two environment variables steer it: ``SUITE_ENGINE`` is ``DeepSpeedEngine`` or ``MeftEngine``; ``SUITE_RESULTS`` is a
folder, which gets ``outcomes.json`` (of each test, by its id: ``passed``, ``failed`` or ``skipped``) and
``engines.txt`` (a line with the class of each engine that was built, whichever process built it).

DeepSpeed's tests run in processes that multiprocessing's fork server starts. That server imports this module too, so
the engine is replaced there as well; and its children find DeepSpeed imported, which halves the time that they take.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

# The installed one, before the tests' conftest puts its own checkout on the path.
import deepspeed
import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.runtime.engine import DeepSpeedEngine

RESULTS = Path(os.environ["SUITE_RESULTS"])
_order = ["passed", "skipped", "failed"]
_outcomes: dict[str, str] = {}


def _note_engines() -> None:
    """Write down the class of every engine that is built from now on."""
    init = DeepSpeedEngine.__init__

    @functools.wraps(init)
    def noting_init(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
        with (RESULTS / "engines.txt").open("a") as file:
            file.write(f"{type(self).__name__}\n")
        init(self, *args, **kwargs)

    DeepSpeedEngine.__init__ = noting_init


def _use_meft_engine() -> None:
    """Have ``deepspeed.initialize`` build a ``MeftEngine`` where the configuration has no block, too."""
    from meft_engine import enable
    from meft_engine.engine import MeftEngine

    enable()
    deepspeed.DeepSpeedEngine = MeftEngine


def _load_what_children_need() -> None:
    """Have every child forked from here find imported and compiled what would take it seconds, or time it out."""
    importlib.import_module("torch._dynamo")  # which the first optimizer imports
    for builder in (FusedAdamBuilder, CPUAdamBuilder):
        builder().load(verbose=False)


# All-reduce over shared memory takes a minute to compile, and no engine has a say in it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
_load_what_children_need()
_note_engines()
if os.environ["SUITE_ENGINE"] == "MeftEngine":
    _use_meft_engine()
multiprocessing.set_forkserver_preload([__name__])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a test went; of set-up, call and tear-down the worst counts."""
    before = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(before, report.outcome, key=_order.index)
    # At once: a later test may hang until the run is killed.
    if report.when == "teardown":
        (RESULTS / "outcomes.json").write_text(json.dumps(_outcomes))
