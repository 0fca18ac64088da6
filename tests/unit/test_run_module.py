"""What the launcher module makes of the launcher's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import meft_engine.run
from meft_engine.run import split_arguments


def test_launcher_arguments_come_first_among_the_scripts_own(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    given = ["--local_rank=1", str(script), "--lr", "0.1", "--", "-m", "x"]
    assert split_arguments(given) == (str(script), False, ["--local_rank=1", "--lr", "0.1", "--", "-m", "x"])


def test_a_module_in_place_of_a_script():
    given = ["--local_rank=1", "-m", "pkg.train", "--lr", "0.1"]
    assert split_arguments(given) == ("pkg.train", True, ["--local_rank=1", "--lr", "0.1"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no script; usage: deepspeed --module meft_engine.run train.py"),
        (["--local_rank=0"], "no script"),
        (["--local_rank=0", "-m"], "no module after -m"),
        (["--local_rank=0", "nowhere.py"], "'nowhere.py' does not exist"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(given, words):
    with pytest.raises(SystemExit) as raised:
        split_arguments(given)
    assert words in str(raised.value) and "\n" not in str(raised.value)


SCRIPT = """
import json, sys
import neighbour, peft, meft_engine
from deepspeed.runtime.engine import DeepSpeedEngine
print(json.dumps([__name__, __file__, sys.argv, neighbour.__file__, DeepSpeedEngine.__init__.__name__,
                  DeepSpeedEngine.__init__.__code__.co_name]))
assert not peft.__file__.startswith(meft_engine.__path__[0])
"""


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("start", [["-m", "meft_engine.run"], [meft_engine.run.__file__]], ids=["module", "file"])
def test_a_script_runs_as_if_it_had_been_started_itself(start, as_module, tmp_path):
    """DeepSpeed starts the module by its name or, under Slurm, by the path of its file."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "train_me.py"
    script.write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").touch()
    target, cwd = (["-m", "train_me"], script.parent) if as_module else ([str(script)], tmp_path)
    command = [sys.executable, *start, "--local_rank=0", *target, "--lr", "0.1"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=120)
    name, file, argv, neighbour, _, code = json.loads(done.stdout.splitlines()[-1])
    assert name == "__main__" and Path(file) == script and argv[1:] == ["--local_rank=0", "--lr", "0.1"]
    assert Path(argv[0]) == script and Path(neighbour).parent == script.parent
    assert code == "_init_engine", "MEFT is enabled before the script's first line"
