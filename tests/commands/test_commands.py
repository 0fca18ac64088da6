"""Runs the commands of the documents, in the order in which they stand there, as a reader would.

What stands for something of the reader's (a model, data, a script) is a small one of that name: commands run as they
are written, on a CPU, and are judged by their exit codes and by what they leave. ``make`` is left to continuous
integration, except that every benchmark runs in its quick form here; programs that need other machines are named in
:data:`tests.documents.ELSEWHERE`, with the tests of theirs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ELSEWHERE, ROOT, commands, without_ellipses
from tests.process_groups import free_port, without_ranks
from tests.sweep_materials import DS_CONFIG, write_model

pytestmark = pytest.mark.commands

COMMANDS = [(place, command) for place, command in commands() if shlex.split(command)[0] != "make"]
STARTED = {"deepspeed", "python", "meft-engine", "accelerate", "pip"}
HUB_MODELS = ("meta-llama/Llama-3.1-8B", "huggyllama/llama-7b")
QUESTIONS = [{"prompt": f"city {i} is", "completion": f" {chr(97 + i % 26) * 3}"} for i in range(64)]
EARLIER = ("runs/first", "runs/small", "runs/large", "runs/demo/adapter", "FOLDER")
"""Runs that commands read; a document that does not make one finds a copy of the README's there."""


def lines(path: Path, records: list[dict]) -> None:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))


def write_datasets(folder: Path) -> None:
    """Natural Questions and GSM8K, as the hub has them: what a column holds, names of splits and of configurations."""
    answers = [{"question": line["prompt"], "answer": [line["completion"]]} for line in QUESTIONS]
    solved = [
        {"question": line["prompt"], "answer": f"{line['completion']} #### {i}"} for i, line in enumerate(QUESTIONS)
    ]
    for name, records, splits in (
        ("google-research-datasets/nq_open", answers, ("train", "validation")),
        ("openai/gsm8k", solved, ("train", "test")),
    ):
        for split in splits:
            lines(folder / name / f"main/{split}.jsonl", records)
        card = "\n".join(f"  - split: {split}\n    path: main/{split}.jsonl" for split in splits)
        (folder / name / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{card}\n---\n")


def write_ssh(path: Path) -> None:
    """The way to the one host of the hostfile, which is this one; several hosts are played in tests/cluster."""
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1" = -o ] && shift 2\nshift\nexec "$@"\n')
    path.chmod(0o755)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder before the first command."""
    folder = tmp_path_factory.mktemp("materials")
    write_model(folder / "MODEL")
    (folder / "MODEL/chat_template.jinja").write_text("{% for said in messages %}{{ said['content'] }} {% endfor %}")
    for name in HUB_MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder / "MODEL", folder / name)
    for name in ("train.jsonl", "test.jsonl", "runs/facts/train.jsonl", "runs/facts/trained.jsonl"):
        lines(folder / name, QUESTIONS)
    shutil.copytree(folder / "MODEL", folder / "runs/model")
    write_datasets(folder)
    (folder / "prompts.txt").write_text("city 1 is\ncity 2 is\n")
    (folder / "sample.txt").write_text("\n".join(line["prompt"] + line["completion"] for line in QUESTIONS))
    (folder / "ds_config.json").write_text(json.dumps({**DS_CONFIG, "train_micro_batch_size_per_gpu": 8}))
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / "package").mkdir()
    for name in ("train.py", "package/train.py"):
        shutil.copy(Path(__file__).with_name("train.py"), folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    write_ssh(folder / "bin/ssh")
    for name in ("launch", "ds_configs", "benchmarks", "setup.cfg"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(folder: Path, command: str, limit: float = 400) -> str:
    """Run one command in a folder, and return what it printed; fails where it does."""
    words = shlex.split(without_ellipses(command).partition(" | ")[0])
    # Without GPUs launchers and the Trainer ask for this; ports are free ones, since other tests may run.
    if words[0] == "accelerate":
        words[2:2] = ["--num_processes", "1", "--main_process_port", str(free_port())]
    elif words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
        words += ["--use_cpu"] if "launch/finetune.py" in words else []
    path = (folder / "bin", Path(sys.executable).parent, os.environ["PATH"])
    environment = {
        **without_ranks(os.environ),
        "PATH": ":".join(map(str, path)),
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "hub"),
    }
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, input="city 3 is\n\n", capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def first_run(materials: Path) -> Path:
    """The README's first run, for the documents that begin with one."""
    (command,) = [c for place, c in COMMANDS if place == "README.md" and "finetune.py" in c]
    run(materials, command)
    shutil.move(materials / "runs/first", materials / "earlier")
    return materials / "earlier"


@pytest.fixture(scope="module")
def folder_of(materials: Path, first_run: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a document's reader; commands of one document follow each other in it."""
    made: dict[str, Path] = {}

    def folder(place: str) -> Path:
        if place not in made:
            made[place] = tmp_path_factory.mktemp("reader") / "work"
            shutil.copytree(materials, made[place], symlinks=True, ignore=shutil.ignore_patterns("earlier", "own"))
            outputs = {word for at, c in COMMANDS if at == place for word in re.findall(r"--output_dir (\S+)", c)}
            for name in {*EARLIER} - outputs:
                shutil.copytree(first_run, made[place] / name)
                next((made[place] / name).glob("checkpoint-*")).rename(made[place] / name / "checkpoint-500")
        return made[place]

    return folder


@pytest.mark.parametrize(("place", "command"), COMMANDS)
def test_it_runs(place: str, command: str, folder_of) -> None:
    program = Path(shlex.split(command)[0]).name
    if program in ELSEWHERE or "--slurm" in command or "-e ." in command.replace("'", ""):
        pytest.skip("make installs it" if program == "pip" else "other tests run it")
    assert program in STARTED, f"{program} is not started here"
    folder = folder_of(place)
    before = set(folder.rglob("*"))
    printed = run(folder, command)
    if "meft_engine.run" in command:
        assert "trained by MeftEngine" in printed
    if "finetune.py" in command and program == "deepspeed":
        made = folder / re.search(r"--output_dir (\S+)", command)[1]
        assert (made / "adapter_config.json").is_file() and not (made / "model.safetensors").exists()
    output = re.search(r"--output(?:_dir)? (\S+)", command)
    if output and "--dry_run" not in command and "jobset.py" not in command:
        assert (folder / output[1]).exists(), f"{output[1]} is not there"
    else:
        assert printed.strip() or set(folder.rglob("*")) - before, "it says nothing and writes nothing"


QUICK = {"bench-gpu": "--tiny"}
TARGETS = {target for _, command in commands() for target in re.findall(r"^make (bench-[\w-]+)", command)}


@pytest.mark.parametrize("target", sorted(TARGETS - {"bench-quality-full"}))  # which is bench-quality with --full
def test_a_benchmark_runs_in_its_quick_form(target: str) -> None:
    """It ends in a JSON object, and leaves what was measured as it is."""
    committed = {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()}
    arguments = [
        "make",
        "--no-print-directory",
        target,
        f"BENCH_ARGS={QUICK.get(target, '--quick')}",
        f"VENV={sys.prefix}",
    ]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()} == committed
