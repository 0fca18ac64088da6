"""Some kernels compiled ahead of time, and that what is wrong with one is seen; `resources.py` compiles them all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.compiled.ahead_of_time import SHARED_LIMITS, Resources, compiled, launches_of
from tests.kernels.compiled.launches import calls
from tests.kernels.compiled.resources import faults, measured


@pytest.mark.parametrize(("name", "target"), [("route", "sm_86"), ("pick", "sm_90"), ("combine", "gfx942")])
def test_kernels_compile_without_a_gpu(name, target):
    found = measured(name, target)
    assert found.keys() == {name}
    assert faults(name, target, found[name]) == []


def test_a_spill_is_seen():
    """With one warp for a tile that eight are to share, registers run out: that is what the figure is read from."""
    launch = launches_of(calls()["score"], "sm_80")[0]
    wide = {"BLOCK_PAIRS": 64, "BLOCK_ROWS": 128, "BLOCK_WIDTH": 32}
    took = compiled(replace(launch, arguments=launch.arguments | wide, options={"num_warps": 1}), "sm_80")
    assert faults("score", "sm_80", took)[0].startswith("score on sm_80 spills ")


def test_what_is_wrong_is_named():
    fine = Resources(registers=64, shared=1024, spilled=0, tensor_cores=8, asynchronous_copies=4)
    assert faults("score/int8", "sm_80", fine) == []
    assert faults("combine", "sm_80", replace(fine, tensor_cores=0)) == []
    assert faults("combine", "sm_80", fine) == ["combine on sm_80 has 8 instructions for tensor cores"]
    assert faults("route", "sm_80", replace(fine, tensor_cores=0))
    assert faults("route", "sm_80", replace(fine, asynchronous_copies=0)) == [
        "route on sm_80 copies nothing asynchronously"
    ]
    assert faults("route", "gfx942", replace(fine, asynchronous_copies=0)) == []
    wide = replace(fine, shared=SHARED_LIMITS["sm_86"] + 1)
    assert faults("score", "sm_80", wide) == [] and len(faults("score", "sm_86", wide)) == 1
