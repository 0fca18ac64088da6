"""A checkpoint that does not fit, or is not whole, is refused in one sentence and leaves the engine as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from meft_engine import MeftConfigError, load_adapter
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, refuse, train_step

TAG = "global_step1"
OURS = (
    "adapter_config.json",
    "rows-0-of-1.safetensors",
    "shared.safetensors",
)
MODEL_STATES, ZERO_STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Path]:
    """For stages 0 and 2 a checkpoint after one step."""
    folders = {}
    for stage in (0, 2):
        folders[stage] = tmp_path_factory.mktemp(f"stage{stage}")
        engine = build_engine(tiny_llama(), stage=stage)
        train_step(engine, [batch(1)])
        engine.save_checkpoint(str(folders[stage]))
        assert (folders[stage] / "latest").read_text() == TAG
    return folders


@pytest.fixture(scope="module")
def engines() -> dict[int, Any]:
    """Engines in another state than the saved ones; a refused load changes nothing, so they are shared."""
    made = {stage: build_engine(tiny_llama(), stage=stage) for stage in (0, 2)}
    for engine in made.values():
        train_step(engine, [batch(2)])
        train_step(engine, [batch(3)])
    return made


@pytest.mark.parametrize("stage", [0, 2])
def test_without_latest_it_raises_instead_of_starting_afresh(stage, saved, engines, tmp_path):
    folder = Path(shutil.copytree(saved[stage], tmp_path / "copy"))
    (folder / "latest").unlink()
    refuse(engines[stage], folder, FileNotFoundError, str(folder / "latest"), "is missing", "tag")
    refuse(engines[stage], folder, FileNotFoundError, "global_step7", "is missing", tag="global_step7")
    refuse(engines[stage], tmp_path / "nowhere", FileNotFoundError, "latest is missing")
    build_engine(tiny_llama(), stage=stage).load_checkpoint(str(folder), tag=TAG)


@pytest.mark.parametrize(
    ("stage", "file"),
    [*((0, f"meft/{name}") for name in OURS), (0, MODEL_STATES), (2, MODEL_STATES), (2, ZERO_STATES)],
)
def test_a_missing_file_is_named(stage, file, saved, engines, tmp_path):
    folder = Path(shutil.copytree(saved[stage], tmp_path / "copy"))
    (folder / TAG / file).unlink()
    refuse(engines[stage], folder, FileNotFoundError, str(folder / TAG / file), "is missing")


def test_another_zero_stage_is_refused_where_the_base_trains_or_was_saved(saved, tmp_path):
    thawed = build_engine(tiny_llama(), tiny_block({"freeze_base": False}), stage=2)
    words = "ZeRO stage 0, 1 ranks and fp32", "ZeRO stage 2, 1 ranks and fp32", "resume with what it was saved with"
    refuse(thawed, saved[0], MeftConfigError, *words, "the base model trains too")
    engine = build_engine(tiny_llama(), tiny_block(checkpoint={"save_base": True}), stage=0)
    engine.save_checkpoint(str(tmp_path))
    refuse(build_engine(tiny_llama(), stage=2), tmp_path, MeftConfigError, *words, "save_base")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"rows": 70, "num_experts": 5}, ("adapter.rows = 35", "not 70")),
        ({"num_experts": 7}, ("adapter.num_experts = 5", "not 7")),
        ({"gate": "sigmoid"}, ("adapter.gate = softmax", "not sigmoid")),
        ({"gate": "none"}, ("adapter.gate = softmax", "not none")),
        ({"top_k": 4}, ("adapter.top_k = 3", "not 4")),
        ({"experts_per_token": 3}, ("adapter.experts_per_token = 2", "not 3")),
        ({"layers_to_transform": [0, 2]}, ("3 FFNs", "2 (model.layers.0.mlp", "other layers")),
    ],
)
def test_another_adapter_is_refused(adapter, words, saved):
    refuse(build_engine(tiny_llama(), tiny_block(adapter)), saved[0], MeftConfigError, *words)


@pytest.mark.parametrize("stage", [0, 2])
def test_another_base_model_is_refused(stage, saved):
    other = build_engine(tiny_llama(seed=1), stage=stage)
    refuse(other, saved[stage], MeftConfigError, "another base model", "model.layers.0.mlp")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_hidden_layers": 2}, ("3 FFNs", "this model 2")),
        ({"hidden_size": 48}, ("model.layers.0.mlp/keys", "(35, 32)", "(48,)")),
        ({"intermediate_size": 96}, ("another base model",)),
    ],
)
def test_a_base_model_of_another_shape_is_refused(shape, words, saved):
    refuse(build_engine(tiny_llama(**shape)), saved[0], MeftConfigError, *words)


def test_load_adapter_refuses_in_the_same_words(saved, tmp_path):
    with pytest.raises(MeftConfigError, match="another base model"):
        load_adapter(tiny_llama(seed=1), saved[0])
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_adapter(tiny_llama(), tmp_path)
    folder = Path(shutil.copytree(saved[0] / TAG / "meft", tmp_path / "copy"))
    (folder / "rows-0-of-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows-0-of-1\.safetensors is missing"):
        load_adapter(tiny_llama(), folder)


def test_a_checkpoint_of_another_format_is_refused(saved, engines, tmp_path):
    """Also before `load_adapter` has attached anything."""
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    described = folder / TAG / "meft" / "adapter_config.json"
    described.write_text(described.read_text().replace('"format": 5', '"format": 99'))
    refuse(engines[0], folder, MeftConfigError, "format = 99", "reads 5")
    model = tiny_llama()
    with pytest.raises(MeftConfigError, match="format = 99"):
        load_adapter(model, folder)
    assert not any("meft_adapter" in name for name, _ in model.named_modules())
