"""The configurations in ds_configs/: valid, explained, and as small as their names say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from meft_engine.config import MeftConfig, find_block
from tests.config_sizes import FOLDER, GIB, LLAMA_3_8B, PROMISES, Needs, fits, needs, plan, read, table

FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_file_promises_something():
    assert set(FILES) == {*PROMISES, "demo_cpu"}


@pytest.mark.parametrize("name", FILES)
def test_it_is_valid_and_its_block_says_nothing_twice(name):
    config = read(name)
    assert find_block(config) is not None
    defaults = MeftConfig().model_dump()
    stated = {f"{s}.{f}": (v, defaults[s][f]) for s, fields in config["meft"].items() for f, v in fields.items()}
    kept = {"adapter.rows", "adapter.experts_per_token", "active_rows.on_overflow"}  # worth seeing all the same
    assert [field for field, (value, default) in stated.items() if value == default and field not in kept] == []


@pytest.mark.parametrize("name", FILES)
def test_it_is_explained(name):
    """In the table of which to take, and in a section that names every field that it sets."""
    assert f"[`{name}.json`]({name}.json)" in README.partition("## Outside the block")[0]
    section = re.search(rf"## Why `{name}\.json` is as it is\n(.*?)(?=\n## |\Z)", README, re.DOTALL)
    assert section, f"{name}.json has no section"
    for part, fields in read(name)["meft"].items():
        for field in fields:
            assert f"`{field}`" in section[1] or f"`{part}.{field}`" in section[1], f"{part}.{field} is not explained"


def test_the_readme_explains_every_field_of_the_block():
    rows = set(re.findall(r"^\| `(\w+)` \|", README.partition('## The `"meft"` block')[2], re.MULTILINE))
    fields = {field for section in MeftConfig().model_dump().values() if isinstance(section, dict) for field in section}
    assert fields | {"enabled"} <= rows


@pytest.mark.parametrize(("name", "model"), [(name, i) for name, p in PROMISES.items() for i in range(len(p.models))])
def test_it_fits_what_its_name_promises(name, model):
    promise = PROMISES[name]
    found = needs(read(name), promise.models[model], promise)
    assert fits(found, promise), f"{found.device / GIB:.1f} GiB on each device, {found.host / GIB:.1f} on a host"


@pytest.mark.parametrize(("name", "model"), [(name, i) for name, p in PROMISES.items() for i in range(len(p.models))])
def test_it_passes_its_plan(name, model):
    found = plan(name, PROMISES[name].models[model], PROMISES[name])
    assert found.fits, found.problems


def test_a_plan_of_the_model_itself_is_that_of_its_shape(tmp_path):
    """Of which activations are known by a formula alone, and here from a run without memory, by the command."""
    given = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    LlamaConfig(**given, num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "meft_engine", "plan", str(FOLDER / "meft_24gb.json"), "--model", str(tmp_path)]
    command += ["--sequence_length", "256", "--device", "cuda", "--device_memory", "25GB", "--host_memory", "64GB"]
    done = subprocess.run([*command, "--no_time", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, by_shape = json.loads(done.stdout), plan("meft_24gb", LLAMA_3_8B, PROMISES["meft_24gb"])
    kinds = found["device_bytes_by_kind"]
    assert found["fits"] and found["model"]["parameters"] == LLAMA_3_8B.parameters
    assert kinds.pop("activations") == pytest.approx(by_shape.device.pop("activations"), rel=0.05)
    assert kinds == by_shape.device


def test_what_is_too_large_for_its_promise_is_noticed():
    promise = PROMISES["meft_24gb"]
    config, model = read("meft_24gb"), promise.models[0]
    twice = {**config, "train_micro_batch_size_per_gpu": 4}
    assert not fits(needs(twice, model, promise), promise), "the device"
    more = {**config, "meft": {**config["meft"], "adapter": {"rows": 16384}}}
    assert not fits(needs(more, model, replace(promise, card=48)), promise), "the host"
    for smaller in (replace(promise, memory=40), replace(PROMISES["meft_48gb"], card=24, memory=64)):
        name = "meft_24gb" if smaller.card == promise.card and smaller.memory == 40 else "meft_48gb"
        assert not plan(name, model, smaller).fits


def test_needs_are_those_of_arithmetic():
    """Worked out by hand for the paper's: 32 layers of 6400 rows, 4096 wide."""
    promise = PROMISES["meft_paper_7b"]
    found = needs(read("meft_paper_7b"), promise.models[0], promise)
    rows = 32 * 2 * 6400
    activations = 512 * (32 * (8 * 4096 + 8 * 4096 + 6 * 11008 + 2 * 4096) + 4 * 4096 + 12 * 32000)
    device = 2 * 6_738_415_616 + activations + 32 * 6400 * 4096 * 2 + 32 * 320 * 4096 * 16 + 6 * 3072 * 4096 * 4
    slots = found.device - device
    assert 32 * 3072 * 4096 * 2 < slots < 32 * 3072 * 4096 * 2 + 10_000_000
    assert found == Needs(found.device, rows * (4096 * 12 + 4), rows * 4096 * 4, 2 * 6_738_415_616)


def test_the_readme_shows_what_each_file_needs():
    assert table() in README, f"`python -m tests.config_sizes` prints the table that belongs there:\n{table()}"


def test_the_guide_shows_what_its_file_needs():
    guide = (FOLDER.parent / "docs" / "guide_24gb.md").read_text(encoding="utf-8")
    promise = PROMISES["meft_24gb"]
    found = [needs(read("meft_24gb"), model, promise) for model in promise.models]
    for start, part, form in (
        ("GPU memory", "device", ".1f"),
        ("host memory for rows", "rows", ".0f"),
        ("host memory for the gradients", "gradients", ".0f"),
        ("host memory for the base", "base", ".0f"),
    ):
        (row,) = (line for line in guide.splitlines() if line.startswith(f"| {start}"))
        assert row.split(" | ")[1:] == [
            f"{getattr(found[0], part) / GIB:{form}}",
            f"{getattr(found[1], part) / GIB:{form}} |",
        ]


def test_numbers_are_written_once():
    """What a launch line has to repeat is what the file says."""
    commands = re.findall(r"--deepspeed ds_configs/(\w+)\.json(.*?)(?=\n```|\n\S*deepspeed )", README, re.DOTALL)
    assert {name for name, _ in commands} >= set(PROMISES) - {"meft_multi_node"}
    for name, rest in commands:
        config = read(name)
        options = dict(re.findall(r"--(\w+) (\w[\w.-]*)", rest))
        if config["train_micro_batch_size_per_gpu"] == "auto":
            continue
        assert int(options["per_device_train_batch_size"]) == config["train_micro_batch_size_per_gpu"], name
        assert int(options.get("gradient_accumulation_steps", 1)) == config["gradient_accumulation_steps"], name
        assert float(options["learning_rate"]) == config["optimizer"]["params"]["lr"], name
        decay = config["optimizer"]["params"]["weight_decay"]
        assert float(options.get("weight_decay", 0)) == decay, name


def test_files_are_written_as_one_reads_them():
    for name in FILES:
        text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
        assert text.endswith("}\n") and max(map(len, text.splitlines())) <= 120
        assert json.loads(text)
