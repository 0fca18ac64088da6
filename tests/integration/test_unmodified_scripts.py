"""Scripts that know nothing of MEFT train through it after `enable()`; without a block they are plain DeepSpeed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.data import TensorDataset

import meft_engine
from meft_engine.checkpoint.saved_adapter import SavedAdapter
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import ds_config, largest_difference
from tests.integration.processes import SCRIPTS, start_jobs, wait_for

ON_TOP = "import meft_engine\n\nmeft_engine.enable()\n"
BLOCK = tiny_block({"rows": 48, "num_experts": 6})

LOOP = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 3}},
    "zero_optimization": {"stage": 2},
}
TRAINER = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}
ADAMW_IN_JSON = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}

# name: (script, with `enable()` on top, configuration, arguments)
JOBS: dict[str, tuple[str, bool, dict[str, Any], dict[str, str]]] = {
    "loop": ("plain_loop", True, {**LOOP, "meft": BLOCK}, {}),
    "loop, block disabled": ("plain_loop", True, {**LOOP, "meft": {**BLOCK, "enabled": False}}, {}),
    "loop, no block": ("plain_loop", True, LOOP, {}),
    "loop, no meft_engine": ("plain_loop", False, LOOP, {}),
    "trainer": ("plain_trainer", True, {**TRAINER, "meft": BLOCK}, {}),
    "trainer, resumed": (
        "plain_trainer",
        True,
        {**TRAINER, "meft": BLOCK},
        {"--resume": "trainer/checkpoint-4"},
    ),
    "trainer, stage 0": (
        "plain_trainer",
        True,
        {**TRAINER, "zero_optimization": {"stage": 0}, "meft": BLOCK},
        {},
    ),
    "trainer, AdamW in JSON": (
        "plain_trainer",
        True,
        {**TRAINER, "optimizer": ADAMW_IN_JSON, "meft": BLOCK},
        {},
    ),
    "trainer, block disabled": ("plain_trainer", True, {**TRAINER, "meft": {**BLOCK, "enabled": False}}, {}),
    "trainer, no meft_engine": ("plain_trainer", False, TRAINER, {}),
}
# Two waves of processes, since a resumed run starts from what another process has saved.
WAVES = [
    {
        "enabled": ["trainer", "trainer, stage 0", "trainer, block disabled", "loop, block disabled", "loop, no block"],
        "without": ["loop, no meft_engine", "trainer, no meft_engine"],
    },
    {"launched": ["loop", "trainer, resumed", "trainer, AdamW in JSON"]},
]


def start(folder: Path, process: str, names: list[str]) -> subprocess.Popen:
    """Start one process that runs some jobs, through DeepSpeed's launcher if it is called `launched`."""
    jobs = []
    for name in names:
        script, enabled, config, arguments = JOBS[name]
        (folder / name).mkdir()
        source = (SCRIPTS / f"{script}.py").read_text()
        copy, config_file = folder / name / "train.py", folder / name / "ds_config.json"
        copy.write_text((ON_TOP if enabled else "") + source)
        config_file.write_text(json.dumps(config))
        flag = "--deepspeed_config" if script == "plain_loop" else "--deepspeed"
        values = [str(folder / value) for value in arguments.values()]
        extra = [part for pair in zip(arguments, values, strict=True) for part in pair]
        jobs.append([str(copy), flag, str(config_file), "--save", str(folder / name), *extra])
    return start_jobs(folder, process, jobs, launched=process == "launched")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every job has run."""
    place = tmp_path_factory.mktemp("scripts")
    for wave in WAVES:
        wait_for(place, {process: start(place, process, names) for process, names in wave.items()})
    return place


def result(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / name / "result.pt", weights_only=True)


def saved_rows(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The masters in the job's last checkpoint."""
    tag = "last" if name.startswith("loop") else "checkpoint-8/global_step8"
    with SavedAdapter(folder / name / tag / "meft") as saved:
        whole = slice(0, saved.description["meft"]["adapter"]["rows"])
        ffns = saved.description["ffns"]
        return {f"{ffn}.{kind}": saved.master_rows(ffn, kind, whole) for ffn in ffns for kind in ("keys", "values")}


def losses(folder: Path, name: str) -> list[float]:
    return [entry["loss"] for entry in result(folder, name)["log"] if "loss" in entry]


@pytest.mark.parametrize("name", ["loop", "trainer", "trainer, stage 0", "trainer, AdamW in JSON"])
def test_an_unmodified_script_trains_rows_and_routers_alone(name, folder):
    done, untrained = result(folder, name), result(folder, f"{name.split(',')[0]}, no meft_engine")
    assert done["engine"] == "MeftEngine" and untrained["engine"] == "DeepSpeedEngine"
    rows = saved_rows(folder, name)
    for layer in range(2):
        assert rows[f"model.layers.{layer}.mlp.values"].any(1).sum() > 24
    # The base is untouched: both scripts start from one seed, and plain DeepSpeed has moved it.
    base = {key: value for key, value in done["parameters"].items() if "meft_adapter" not in key}
    assert base.keys() == untrained["parameters"].keys()
    start = first_parameters(base)
    assert all(torch.equal(base[key], start[key]) for key in base)
    assert not all(torch.equal(untrained["parameters"][key], start[key]) for key in base)


def first_parameters(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the scripts start from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    state = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).state_dict()
    assert state.keys() == like.keys()
    return state


def test_the_loop_learns(folder):
    curve = result(folder, "loop")["losses"]
    assert sum(curve[-2:]) < sum(curve[:2]) - 0.5


@pytest.mark.parametrize("name", ["loop, block disabled", "loop, no block", "trainer, block disabled"])
def test_without_an_enabled_block_it_is_plain_deepspeed_bit_for_bit(name, folder):
    one, plain = result(folder, name), result(folder, f"{name.split(',')[0]}, no meft_engine")
    assert one["engine"] == plain["engine"] == "DeepSpeedEngine"
    assert one["parameters"].keys() == plain["parameters"].keys()
    assert all(torch.equal(one["parameters"][key], plain["parameters"][key]) for key in one["parameters"])
    if "losses" in one:
        assert one["losses"] == plain["losses"]
    else:
        assert losses(folder, name) == losses(folder, "trainer, no meft_engine")


def test_the_trainer_resumes_from_its_checkpoint_exactly(folder):
    """With attention dropout, accumulation and a schedule, in another process."""
    through, resumed = losses(folder, "trainer"), losses(folder, "trainer, resumed")
    assert len(through) == 8 and resumed == through
    assert result(folder, "trainer, resumed")["evaluation"] == result(folder, "trainer")["evaluation"]
    one, other = saved_rows(folder, "trainer"), saved_rows(folder, "trainer, resumed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (folder / "trainer, resumed" / "checkpoint-4").exists(), "it must not have started afresh"


def test_the_trainers_own_adamw_and_one_in_the_json_agree(folder):
    assert losses(folder, "trainer, AdamW in JSON") == pytest.approx(losses(folder, "trainer"), abs=1e-4)
    assert largest_difference(saved_rows(folder, "trainer"), saved_rows(folder, "trainer, AdamW in JSON")) < 1e-4


def test_the_trainer_reports_the_joint_norm(folder):
    """What Trainer logs as grad_norm is what clipped."""
    own, stage_0 = (
        [entry["grad_norm"] for entry in result(folder, name)["log"] if "grad_norm" in entry]
        for name in ("trainer", "trainer, stage 0")
    )
    assert len(own) == 8 and min(own) > 0
    assert own == pytest.approx(stage_0, abs=1e-4)


# --- in this process


@pytest.mark.parametrize(
    ("block", "kind"), [(tiny_block(), "Meft"), ({"enabled": False}, "DeepSpeed"), (None, "DeepSpeed")]
)
def test_initialize_returns_what_deepspeed_returns_and_leaves_its_class_alone(block, kind):
    before = dict(vars(DeepSpeedEngine))
    data, scheduler = TensorDataset(torch.arange(8)), {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    given = {"training_data": data, "config": ds_config(block, scheduler=scheduler)}
    engine, *rest = meft_engine.initialize(model=tiny_llama(), **given)
    assert dict(vars(DeepSpeedEngine)) == before
    assert type(engine).__name__ == f"{kind}Engine" and isinstance(engine, deepspeed.DeepSpeedEngine)
    # Without `enable()`, DeepSpeed's own function stays DeepSpeed's, block or not.
    plain, *plain_rest = deepspeed.initialize(model=tiny_llama(), **given)
    assert type(plain) is DeepSpeedEngine
    assert [type(part) for part in rest] == [type(part) for part in plain_rest]
    assert rest == [engine.optimizer, engine.training_dataloader, engine.lr_scheduler] and None not in rest


def test_a_refusal_leaves_deepspeeds_class_alone():
    before = dict(vars(DeepSpeedEngine))
    with pytest.raises(meft_engine.MeftConfigError):
        meft_engine.initialize(model=tiny_llama(), config=ds_config({"adapter": {"rows": 0}}))
    assert dict(vars(DeepSpeedEngine)) == before


def test_enable_and_disable():
    before = dict(vars(DeepSpeedEngine))

    def built(meft: dict[str, Any] | None = None) -> type:
        config = ds_config(tiny_block() if meft is None else meft)
        return type(deepspeed.initialize(model=tiny_llama(), config=config)[0])

    assert built() is DeepSpeedEngine
    meft_engine.enable()
    try:
        meft_engine.enable()
        assert built() is meft_engine.MeftEngine
        assert built({"enabled": False}) is DeepSpeedEngine
        # `initialize` must not end what the user has enabled.
        meft_engine.initialize(model=tiny_llama(), config=ds_config(tiny_block()))
        assert built() is meft_engine.MeftEngine
    finally:
        meft_engine.disable()
    assert dict(vars(DeepSpeedEngine)) == before
    assert built() is DeepSpeedEngine
