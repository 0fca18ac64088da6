"""Scripts without one import of ours train through MEFT when the launch line and the JSON say so, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finetune import is_validated
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import meft_engine
from tests.families import tiny_block
from tests.integration.engines import differing, largest_difference
from tests.integration.processes import SCRIPTS, start_jobs, wait_for
from tests.process_groups import free_port
from tests.sweep_materials import write_materials, write_model

pytest.importorskip("trl")

FINETUNE = Path(__file__).parents[2] / "launch" / "finetune.py"
CONFIG = {
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "zero_optimization": {"stage": 2},
}
# Whose parameters are all partitioned, and not gathered when a model is saved.
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
BLOCK = tiny_block({"rows": 48, "num_experts": 6})
CLM = {
    **{"train_file": "train.json", "validation_file": "validation.json", "model_name_or_path": "model"},
    **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "data_seed": 7},
    **{"logging_steps": 1, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "report_to": "none"},
    # The first checkpoint is the best one, so that the last one must not pass for it.
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
}


def clm(name: str, config: str, **options: Any) -> list[str]:
    """The example of transformers, which writes to the folder ``name``."""
    settings = {**CLM, "output_dir": name, "deepspeed": f"{config}.json", **options}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [str(SCRIPTS / "run_clm.py"), "--do_train", "--do_eval", "--do_predict", "--use_cpu", *flags]


def sft(name: str, config: str, steps: int) -> list[str]:
    return [str(SCRIPTS / "sft.py"), "model", "train.json", name, f"{config}.json", str(steps)]


def finetune(name: str, config: str, **options: Any) -> list[str]:
    settings = {"train_file": "train.json", "output_dir": name, "deepspeed": f"{config}.json", "max_length": 16}
    settings |= {"model_name_or_path": "model", "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, **options}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [str(FINETUNE), "--use_cpu", "--report_to", "none", "--save_strategy", "no", *flags]


def loop(name: str, config: str) -> list[str]:
    return [str(SCRIPTS / "accelerate_loop.py"), "model", name, f"{config}.json"]


ON_THE_LAUNCH_LINE = [
    clm("clm through", "on", max_steps=6),
    clm("clm", "on", max_steps=4, save_total_limit=1),
    clm("clm", "on", max_steps=6, save_total_limit=1),
    sft("sft through", "on", 6),
    sft("sft", "on", 3),
    sft("sft", "on", 6),
    loop("loop", "on"),
    clm("clm stage 3", "stage 3", max_steps=6),
    clm("clm off", "off", max_steps=4),
    sft("sft off", "off", 3),
    loop("loop off", "off"),
    finetune("finetune", "on", eval_share=0.2, eval_strategy="steps", eval_steps=2),
]
PLAIN = [
    clm("clm plain", "none", max_steps=4),
    sft("sft plain", "none", 3),
    loop("loop plain", "none"),
    # The project's own script enables itself, and leaves the process group at its end.
    finetune("finetune streamed", "on", streaming=True, eval_file="validation.json"),
]
WITHOUT_BLOCK = [
    finetune("finetune json", "none", progress="json", max_steps=2, eval_share=0.2, eval_strategy="steps", eval_steps=1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every script has run."""
    place = tmp_path_factory.mktemp("launch")
    write_model(place / "model")
    texts = [f"the code of city number {i * i % 97} is {chr(97 + i % 26) * 3}" for i in range(40)]
    for name, lines in (("train", texts), ("validation", texts[:8])):
        (place / f"{name}.json").write_text("\n".join(json.dumps({"text": text}) for text in lines))
    for name, extra in (("on", {"meft": BLOCK}), ("off", {"meft": {**BLOCK, "enabled": False}}), ("none", {})):
        (place / f"{name}.json").write_text(json.dumps({**CONFIG, **extra}))
    (place / "stage 3.json").write_text(json.dumps({**CONFIG, "zero_optimization": STAGE_3, "meft": BLOCK}))
    running = {
        "launched": start_jobs(place, "launched", ON_THE_LAUNCH_LINE, launched=True, module="meft_engine.run"),
        "plain": start_jobs(place, "plain", PLAIN, launched=True),
        "without block": start_jobs(place, "without block", WITHOUT_BLOCK, launched=True),
    }
    wait_for(place, running, timeout=300)
    return place


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in state(folder)["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", ["clm", "sft", "loop"])
def test_the_output_folder_holds_the_adapter_and_not_the_base(name, folder):
    described = json.loads((folder / name / "adapter_config.json").read_text())
    assert described["peft_type"] == "MEFT" and described["meft"]["adapter"]["rows"] == 48
    rows = load_file(folder / name / "adapter_model.safetensors")
    assert all(rows[f"model.layers.{layer}.mlp.values"].any(1).sum() > 12 for layer in range(3))
    assert not list((folder / name).rglob("model*.safetensors"))
    assert list((folder / f"{name} off").glob("model*.safetensors"))


@pytest.mark.parametrize("name", ["clm", "sft", "loop"])
def test_with_the_block_disabled_it_is_plain_deepspeed(name, folder):
    one, plain = (load_file(folder / f"{name} {kind}" / "model.safetensors") for kind in ("off", "plain"))
    assert differing(one, plain) == []
    assert len(differing(one, load_file(folder / "model" / "model.safetensors"))) == len(one), "it trains everything"


@pytest.mark.parametrize("name", ["clm", "sft"])
def test_a_trainer_resumes_by_itself(name, folder):
    """From the folder's newest checkpoint: transformers' example looks for it, TRL's lines say True."""
    through = losses(folder / f"{name} through")
    assert len(through) == 6 and through[-1] < through[0] - 0.2
    assert losses(folder / name) == through
    if name == "sft":
        one, other = (load_file(folder / n / "adapter_model.safetensors") for n in (name, f"{name} through"))
        assert differing(one, other) == []


def test_a_trainer_keeps_few_checkpoints_and_ends_with_the_best(folder):
    assert sorted(path.name for path in (folder / "clm").glob("checkpoint-*")) == ["checkpoint-2"]
    kept = sorted(path.name for path in (folder / "clm through").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert Path(state(folder / "clm through")["best_model_checkpoint"]).name == "checkpoint-2"
    final, best, last = (
        load_file(folder / "clm through" / part / "adapter_model.safetensors") for part in ("", kept[0], kept[2])
    )
    assert differing(final, best) == [] and differing(best, last) != []
    evaluations = [e["eval_loss"] for e in state(folder / "clm through")["log_history"] if "eval_loss" in e]
    results = json.loads((folder / "clm through" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(max(evaluations), abs=1e-6) and max(evaluations) == evaluations[0]


@pytest.mark.parametrize("part", ["", "checkpoint-2"])
def test_another_process_loads_what_trainer_saved_and_gets_equal_logits(part, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    meft_engine.load_adapter(model, folder / "clm" / part)
    predicted = torch.from_numpy(np.load(folder / "clm" / "predictions.npy"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "clm")
    texts = [json.loads(line)["text"] for line in (folder / "validation.json").read_text().splitlines()]
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits
    torch.testing.assert_close(logits, predicted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["finetune", "finetune streamed"])
def test_finetune_shows_lengths_trains_and_saves(name, folder):
    curve = losses(folder / name)
    assert len(curve) == 6 and curve[-1] < curve[0] - 0.2
    report = json.loads((folder / name / "train_report.json").read_text())
    assert report["steps"] == 6 and report["rows"] == 48 and 0 < report["touched_share"] < 1
    assert json.loads((folder / name / "adapter_config.json").read_text())["peft_type"] == "MEFT"
    log = (folder / f"{'plain' if 'streamed' in name else 'launched'}.log").read_text()
    assert log.count("Length of examples in tokens (max_length 16)") == 1
    assert ("first " in log) == ("streamed" in name)


@pytest.mark.parametrize(("name", "steps"), [("finetune", [2, 4, 6]), ("finetune streamed", [6])])
def test_finetune_validates_what_it_has_trained_once(name, steps, folder):
    assert [entry["step"] for entry in state(folder / name)["log_history"] if "eval_loss" in entry] == steps


@pytest.mark.parametrize("best", [False, True])
def test_the_best_weights_are_validated_anew(best):
    state = SimpleNamespace(global_step=4, log_history=[{"eval_loss": 1.0, "step": 2}, {"loss": 1.0, "step": 4}])
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=best))
    assert not is_validated(trainer)
    state.log_history.append({"eval_loss": 1.0, "step": 4})
    assert is_validated(trainer) != best


def test_finetune_shows_lines_where_there_is_no_terminal(folder):
    lines = [line for line in (folder / "launched.log").read_text().splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]
    for line, loss in zip(lines, losses(folder / "finetune"), strict=True):
        assert f"loss {loss:.4f}" in line and " tokens/s" in line and " touched " in line


def test_finetune_without_a_block_tells_programs_what_it_does(folder):
    """One object for each log, evaluation and end; what DeepSpeed says of itself stands between them."""
    lines = (folder / "without block.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith('{"event"')]
    assert [event["event"] for event in events] == ["train", "eval", "train", "eval", "end"]
    trained = [event for event in events if event["event"] == "train"]
    assert [event["loss"] for event in trained] == losses(folder / "finetune json")
    assert all(event["tokens_per_second"] > 0 and "meft/touched_share" not in event for event in trained)
    report = json.loads((folder / "finetune json" / "train_report.json").read_text())
    assert events[-1] == {"event": "end", **report}
    assert "Length of examples" not in "".join(lines)


def test_stage_3_saves_as_the_others_do(folder):
    assert losses(folder / "clm stage 3") == pytest.approx(losses(folder / "clm through"), abs=1e-4)
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("clm stage 3", "clm through"))
    assert largest_difference(one, other) < 1e-4
    assert not list((folder / "clm stage 3").rglob("model*.safetensors"))
    assert not list((folder / "clm stage 3").glob("global_step*")), "Trainer took a detour, for weights it cannot get"


def test_the_loop_learns(folder):
    log = (folder / "launched.log").read_text()
    curve = [float(line.split()[1]) for line in log.splitlines() if line.startswith("loss ")]
    with_adapter, everything = curve[:12], curve[12:]
    assert len(everything) == 12 and with_adapter[0] == everything[0]
    assert sum(with_adapter[-4:]) < sum(with_adapter[:4]) - 1 and with_adapter != everything


def test_fine_tuning_does_not_begin_where_accelerate_would_leave_deepspeed_out(tmp_path):
    write_materials(tmp_path)
    options = {"model_name_or_path": "model", "train_file": "train.jsonl", "output_dir": "out", "deepspeed": "ds.json"}
    command = [sys.executable, str(FINETUNE), *(part for key, value in options.items() for part in (f"--{key}", value))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    done = subprocess.run(
        [*command, "--use_cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "finetune.py: deepspeed = 'ds.json' would not be used" in done.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))
