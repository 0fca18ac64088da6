"""Mutants are of the code as it is; whether tests notice them takes minutes (`make test-mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import late_mutants as of_waits
from tests.kernels import mutants as of_kernels
from tests.mutation import ROOT, Mutant, mutated

MUTANTS = [*of_kernels.MUTANTS, *of_waits.MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_changes_something_and_has_tests(mutant):
    compile(mutated(mutant), mutant.file, "exec")
    assert all(Path(ROOT, path.partition("::")[0]).is_file() for path in mutant.tests.split())


def test_one_that_would_change_nothing_is_refused():
    with pytest.raises(ValueError, match=r"a: setup.cfg has changed, and does not contain 'no such text'"):
        mutated(Mutant("a", "setup.cfg", "no such text", "", ""))
