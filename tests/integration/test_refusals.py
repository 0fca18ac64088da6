"""What cannot work is refused in one clear sentence, before a single table is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

import meft_engine
from meft_engine import MeftConfigError
from meft_engine.adapter import attach as attach_module
from tests.families import tiny_block, tiny_llama
from tests.integration.engines import ds_config


class LionLike(torch.optim.Optimizer):
    """An optimizer that no one has heard of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0})


class OwnAdamW(torch.optim.AdamW):
    """A subclass of AdamW is still AdamW."""


@pytest.fixture
def allocated(monkeypatch) -> list[str]:
    """Names of the tables that are made."""
    made = []
    original = attach_module.PartiallyOffloadedTensor

    def record(name: str, *args: Any, **kwargs: Any) -> Any:
        made.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(attach_module, "PartiallyOffloadedTensor", record)
    return made


def refuse(
    allocated: list[str], *words: str, model: nn.Module | None = None, config: Any = None, **kwargs: Any
) -> None:
    """``initialize`` raises one sentence with these words and leaves the model as it was."""
    model = tiny_llama() if model is None else model
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = ds_config(tiny_block()) if config is None else config
    with pytest.raises(MeftConfigError) as raised:
        meft_engine.initialize(model=model, config=config, **kwargs)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert allocated == []
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == state
    assert "meft" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_recorded_is_what_is_allocated(allocated):
    """The other tests would pass on an empty list whatever happened, were this one not here."""
    meft_engine.initialize(model=tiny_llama(), config=ds_config(tiny_block()))
    assert len(allocated) == 6 and allocated[0] == "model.layers.0.mlp/keys"


# --- DeepSpeed's settings


def test_fp16_without_zero(allocated):
    config = ds_config(tiny_block(), fp16={"enabled": True})
    refuse(allocated, "fp16.enabled = true", "stage 0", "use bf16", config=config)


def test_parameters_that_are_partitioned_twice(allocated):
    config = ds_config(tiny_block(), stage=3)
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    refuse(allocated, "zero_hpz_partition_size = 2", "leave it out", config=config)


def test_parameters_that_are_partitioned_within_groups(allocated, monkeypatch):
    """MiCS, which DeepSpeed 0.19 has dropped; before, it was a field of the ZeRO configuration."""
    monkeypatch.setattr(DeepSpeedZeroConfig, "mics_shard_size", 4, raising=False)
    config = ds_config(tiny_block(), stage=3)
    refuse(allocated, "mics_shard_size = 4", "leave it out", config=config)


def test_zero_without_a_norm(allocated):
    config = ds_config(tiny_block(), stage=2)
    config["zero_optimization"]["compute_grad_norm"] = False
    refuse(allocated, "compute_grad_norm = false", "leave it out", config=config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": {"use_node_local_storage": True}}, ("use_node_local_storage = true", "all nodes see")),
        ({"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}, ("writer.decoupled = true", "async_save")),
        ({"datastates_ckpt": {"host_cache_size": 1}}, ("datastates_ckpt", "async_save")),
    ],
)
def test_checkpoints_that_are_not_whole_when_the_save_is_done(settings, words, allocated):
    refuse(allocated, *words, config=ds_config(tiny_block(), **settings))


@pytest.mark.parametrize("autocast", ["float16", "bfloat16"])
def test_autocast_that_scales_the_loss_out_of_sight(autocast, allocated):
    """DeepSpeed's `torch_autocast` in fp16 scales the loss by a scaler of its own; in bf16 there is none."""
    config = ds_config(tiny_block(), torch_autocast={"enabled": True, "dtype": autocast})
    if autocast == "float16":
        refuse(allocated, "torch_autocast", "bfloat16", config=config)
    else:
        meft_engine.initialize(model=tiny_llama(), config=config)


@pytest.fixture
def as_two_ranks(monkeypatch) -> None:
    """What is refused is refused before ranks begin to talk."""
    meft_engine.initialize(model=tiny_llama(), config=ds_config({"enabled": False}))  # joins the process group
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args, **kwargs: 2)


def test_stale_rows_with_several_ranks(allocated, as_two_ranks):
    config = ds_config(tiny_block(optimizer={"max_staleness": 1}))
    refuse(allocated, "optimizer.max_staleness = 1 with 2 ranks", "use 0", config=config)


def test_rows_of_the_device_with_several_ranks(allocated, as_two_ranks):
    config = ds_config(tiny_block(offload={"resident_bytes": 1000}))
    refuse(allocated, "offload.resident_bytes = 1000", "2 ranks", "use 0", config=config)


def test_a_base_that_is_split_by_width(allocated, as_two_ranks):
    config = ds_config(tiny_block(), tensor_parallel={"autotp_size": 2})
    refuse(allocated, "tensor_parallel.autotp_size = 2", "leave it out", config=config)


# --- optimizers


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), ("SGD", "not of Adam's family", "use AdamW")),
        (lambda p: torch.optim.Adagrad(p), ("Adagrad", "not of Adam's family")),
        (LionLike, ("LionLike", "not of Adam's family")),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), ("Adam ", "weight_decay = 0.1", "use AdamW")),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), ("amsgrad = True", "not supported")),
        (lambda p: torch.optim.AdamW(p, maximize=True), ("maximize = True", "not supported")),
    ],
)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_client_optimizer_that_rows_cannot_follow(make, words, stage, allocated):
    model = tiny_llama()
    optimizer = make(model.parameters())
    refuse(
        allocated,
        *words,
        model=model,
        optimizer=optimizer,
        config=ds_config(tiny_block(), stage=stage, adam={}),
    )


def test_one_bad_group_is_enough(allocated):
    model = tiny_llama()
    first, *others = model.parameters()
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": others, "weight_decay": 0.3}])
    refuse(
        allocated,
        "weight_decay = 0.3",
        model=model,
        optimizer=optimizer,
        config=ds_config(tiny_block(), adam={}),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
        OwnAdamW,
    ],
)
def test_adams_kin_is_accepted(make):
    model = tiny_llama()
    config = ds_config(tiny_block(), adam={})
    engine, *_ = meft_engine.initialize(model=model, optimizer=make(model.parameters()), config=config)
    assert type(engine) is meft_engine.MeftEngine


@pytest.mark.parametrize("name", ["Lamb", "SGD", "Lion", "Adagrad", "OneBitAdam", "Muon"])
def test_a_json_optimizer_that_rows_cannot_follow(name, allocated):
    config = ds_config(tiny_block(), optimizer={"type": name, "params": {"lr": 1e-3}})
    refuse(allocated, "optimizer.type = ", name[1:], "not of Adam's family", 'use "AdamW"', config=config)


def test_l2_adam_in_json(allocated):
    parameters = {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True, "adam_w_mode": False}
    config = ds_config(tiny_block(), optimizer={"type": "Adam", "params": parameters})
    refuse(allocated, "adam_w_mode = false", "weight_decay = 0.1", 'use "AdamW"', config=config)


def test_no_optimizer(allocated):
    refuse(allocated, "no optimizer", '"AdamW"', config=ds_config(tiny_block(), adam={}))


def test_an_optimizer_made_by_a_callable_is_refused_too():
    """It exists only once DeepSpeed has called it, so this one sentence comes after the allocation."""
    with pytest.raises(MeftConfigError, match="SGD is not of Adam's family"):
        meft_engine.initialize(
            model=tiny_llama(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            config=ds_config(tiny_block(), adam={}),
        )


# --- the block and the model


@pytest.mark.parametrize("key", ["MEFT", "meft_config", "mefft", "Meft"])
def test_a_block_under_the_wrong_key(key, allocated):
    config = {**ds_config(None), key: tiny_block()}
    refuse(allocated, f'unknown top-level key "{key}"', '"meft"', config=config)


def test_a_block_in_the_wrong_place(allocated):
    config = ds_config(None)
    config["optimizer"]["meft"] = tiny_block()
    refuse(allocated, '"meft" stands inside "optimizer"', "top level", config=config)


def test_a_bad_block(allocated):
    refuse(allocated, "adapter.rows = 36", "35 and 40", config=ds_config(tiny_block({"rows": 36})))


def test_a_model_without_an_ffn(allocated):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    refuse(allocated, "no FFN", "adapter.target_modules", "Sequential", model=model)


def test_a_layer_that_is_not_there(allocated):
    refuse(allocated, "layer 7", "0 to 2", config=ds_config(tiny_block({"layers_to_transform": [1, 7]})))


def test_too_little_host_memory(allocated):
    """Both numbers are named, before any of it is taken."""
    block = tiny_block({"rows": 2**30, "num_experts": 2**15})
    refuse(allocated, f"adapter.rows = {2**30} in 3 layers needs", "GiB are available", config=ds_config(block))


def test_a_model_that_has_adapters_already(allocated):
    model = tiny_llama()
    meft_engine.initialize(model=model, config=ds_config(tiny_block()))
    allocated.clear()
    with pytest.raises(MeftConfigError, match="already has MEFT adapters"):
        meft_engine.initialize(model=model, config=ds_config(tiny_block()))
    assert allocated == []


def test_a_pipeline_module(allocated):
    from deepspeed.pipe import PipelineModule

    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model = PipelineModule(layers=layers, num_stages=1, loss_fn=nn.MSELoss())
    refuse(allocated, "PipelineEngine", "no PipelineModule", "meft.enabled to false", model=model)


def test_a_hybrid_engine(allocated):
    config = ds_config(tiny_block(), stage=2, hybrid_engine={"enabled": True})
    refuse(allocated, "DeepSpeedHybridEngine", "no hybrid engine", config=config)
