"""Every command in the documents names what exists, with options that its own parser takes."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from finetune_arguments import DataArguments, Parser

from meft_engine import cli
from tests.documents import ELSEWHERE, ROOT, commands, without_ellipses

THEIRS = {"train.py", "package.train"}
"""Scripts and modules that stand for the reader's own."""


class _Parsed(Exception):
    """A parser was satisfied, and found this."""


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever parses its command line does nothing else."""
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _Parsed(original(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises for a command that could not be run as it stands."""
    command = without_ellipses(command)
    first, pipe, after = command.partition(" | ")
    if pipe:
        check(first, monkeypatch)
        check(after, monkeypatch)
        return
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, arguments = Path(words[0]).name, words[1:]
    if program in ELSEWHERE:
        assert (ROOT / ELSEWHERE[program][1]).is_file()
        inner = re.search(r"python (-m \S+.*)$", command)
        if inner:
            check(inner[0], monkeypatch)
    elif program == "accelerate":
        check_accelerate(arguments, monkeypatch)
    elif program == "make":
        check_make(arguments, monkeypatch)
    elif program == "python":
        check_python(arguments, monkeypatch)
    elif program == "pip":
        check_pip(arguments)
    elif program == "deepspeed":
        check_deepspeed(arguments, monkeypatch)
    elif program == "meft-engine":
        with pytest.raises(_Parsed):
            cli.main(arguments)
    else:
        pytest.fail(f"{program} is no program that is known here; list it in ELSEWHERE with a test that runs it")


def check_make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets and variables of the Makefile; what a benchmark is given, its parser takes."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^([\w-]+):[^\n=]*\n((?:\t[^\n]*\n?)*)", makefile, re.MULTILINE))
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        assert target in recipes, f"the Makefile has no target {target}"
    for name in settings:
        assert f"$({name})" in makefile, f"the Makefile has no variable {name}"
    if "BENCH_ARGS" in settings:
        (target,) = targets
        script = re.search(r"(benchmarks/\w+\.py)", recipes[target])
        assert script and "$(BENCH_ARGS)" in recipes[target]
        check_python([script[1], *shlex.split(settings["BENCH_ARGS"])], monkeypatch)


def check_pip(arguments: list[str]) -> None:
    """It installs this project, with extras that there are."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert arguments[0] == "install"
    project = re.fullmatch(r"(?:meft-engine|\.)(?:\[([\w,]+)\])?", arguments[-1])
    assert project, f"{arguments[-1]} is not this project"
    assert set((project[1] or "").split(",")) - {""} <= set(setup["options.extras_require"])


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of ours with options that it takes, or a module that is there."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
        if arguments[1] == "meft_engine.run":
            script = arguments[3] if arguments[2] == "-m" else arguments[2]
            assert script in THEIRS or (ROOT / script).is_file()
        elif arguments[1] == "meft_engine":
            check_python(["meft-engine", *arguments[2:]], monkeypatch)
        return
    path, options = ROOT / arguments[0], arguments[1:]
    assert path.is_file(), f"there is no {arguments[0]}"
    if options == ["--help"]:
        return
    if path.name == "finetune.py":
        check_finetune(options)
        return
    monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    with pytest.raises(_Parsed):
        module.main()


def check_finetune(options: list[str]) -> None:
    """Without TrainingArguments themselves, which join a process group; files of ours that are named exist."""
    found, rest = Parser().parse_known_args(options)
    assert rest == []
    DataArguments(**{name: getattr(found, name) for name in DataArguments.__dataclass_fields__})
    assert found.deepspeed == "ds_config.json" or (ROOT / found.deepspeed).is_file()


def check_deepspeed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher's own parser; then the script and its options."""
    from deepspeed.launcher import runner

    with pytest.raises(_Parsed) as parsed:
        runner.parse_args(arguments)
    found = parsed.value.args[0]
    if found.module:
        check_python(["-m", found.user_script, *found.user_args], monkeypatch)
    else:
        check_python([found.user_script, *found.user_args], monkeypatch)


def check_accelerate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By accelerate's own parser of ``accelerate launch``; then the script and its options."""
    from accelerate.commands import launch

    assert arguments[0] == "launch"
    with pytest.raises(_Parsed) as parsed:
        launch.launch_command_parser().parse_args(arguments[1:])
    found = parsed.value.args[0]
    script = [found.training_script, *found.training_script_args]
    check_python(["-m", *script] if found.module else script, monkeypatch)


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize(("place", "command"), list(commands()))
def test_it_could_be_run_as_it_stands(place: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make test NOTHING=1",
        'make bench-gpu BENCH_ARGS="fit24 --layer 8 --nothing"',
        "python launch/nothing.py",
        "python launch/evaluate.py --model MODEL",
        "python -m meft_engine.nothing",
        "python launch/generate.py --model MODEL --nothing 3",
        "accelerate launch --nothing --module meft_engine.run train.py",
        "deepspeed --nothing launch/finetune.py --output_dir x",
        "deepspeed launch/finetune.py --model_name_or_path m --train_file f --output_dir x --deepspeed no.json",
        "deepspeed launch/finetune.py --model_name_or_path m --output_dir x --deepspeed ds_configs/meft_24gb.json",
        "deepspeed launch/finetune.py --model_name_or_path m --train_file f --output_dir x --nothing 3",
        "meft-engine nothing",
        "pip install 'meft-engine[nothing]'",
        "make test | nothing",
        "nothing --at all",
    ],
)
def test_what_could_not_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit, pytest.fail.Exception, ModuleNotFoundError)):
        check(command, monkeypatch)


def test_all_documents_are_looked_at() -> None:
    places = {place for place, _ in commands()}
    assert {
        "README.md",
        "docs/training.md",
        "ds_configs/README.md",
        "benchmarks/README.md",
        "CONTRIBUTING.md",
    } <= places
