"""The `"meft"` block: every mistake gets one sentence that names the field, the value and what would be right."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meft_engine import config as config_module
from meft_engine.config import MeftConfig, MeftConfigError, derived_num_experts, find_block
from meft_engine.cores import rank_cores

# The defaults of DESIGN.md's block, for the fields whose code exists.
DESIGNED = json.loads("""{
  "enabled": true,
  "adapter": { "rows": 8192, "num_experts": null, "experts_per_token": 8, "top_k": 28, "gate": "softmax",
               "target_modules": null, "layers_to_transform": null, "init_keys": "ffn",
               "center_inputs": true, "freeze_base": true, "seed": 42 },
  "router": { "lr_scale": 1.0, "balance": "loss", "balance_coef": 0.01, "z_loss_coef": 0.0 },
  "active_rows": { "cap": null, "on_overflow": "keep_largest" },
  "offload": { "keys": "device", "keys_dtype": "bf16", "compute_dtype": null, "pin_memory": true, "slot_bytes": null,
               "grad_slot_bytes": null, "resident_bytes": 0, "huge_pages": true },
  "optimizer": { "lr_scale": 1.0, "value_lr_scale": 4.0, "mode": "lazy", "moments_dtype": "fp32", "overlap": null,
                 "max_staleness": 0, "num_threads": null, "worker_timeout": 10.0 },
  "communication": { "dtype": "fp32", "timeout": 300.0 },
  "checkpoint": { "async_save": false, "snapshot_bytes": null, "save_base": false, "keep_last": null },
  "monitor": { "interval": 10, "folder": null, "min_kept_mass": 0.9, "max_dead_experts": 0.5 }
}""")


def complaint(block: object) -> str:
    """The message about a bad block, checked to be one sentence: one line, no traceback, nothing of pydantic's."""
    with pytest.raises(MeftConfigError) as caught:
        MeftConfig.from_block(block)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and "Config" not in message and ". " not in message
    assert message.startswith('"meft"')
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


BAD = {
    "unknown field, misspelt": ({"adapter": {"row": 3}}, ["adapter.row", "3", 'mean "rows"']),
    "unknown field, nothing like it": ({"optimizer": {"zzz": 1}}, ["optimizer.zzz", "1", "lr_scale"]),
    "unknown section, misspelt": ({"adaptor": {}}, ["adaptor", "{}", 'mean "adapter"']),
    "unknown section": (
        {"zzz": {"dtype": "fp32"}},
        ["zzz", "dtype", "active_rows, adapter, checkpoint"],
    ),
    "section in itself": ({"adapter": {"adapter": {}}}, ["adapter.adapter", "{}", "rows, seed"]),
    "section is a number": ({"adapter": 5}, ["adapter", "5", "object"]),
    "section is null": ({"offload": None}, ["offload", "None", "object"]),
    "enabled is a word": ({"enabled": "yes"}, ["enabled", "'yes'", "boolean"]),
    "enabled is a number": ({"enabled": 1}, ["enabled", "1", "boolean"]),
    "rows is a word": ({"adapter": {"rows": "8192"}}, ["adapter.rows", "'8192'", "integer"]),
    "rows is a fraction": ({"adapter": {"rows": 8192.0}}, ["adapter.rows", "8192.0", "integer"]),
    "rows is true": ({"adapter": {"rows": True}}, ["adapter.rows", "True", "integer"]),
    "rows is null": ({"adapter": {"rows": None}}, ["adapter.rows", "None", "integer"]),
    "no rows": ({"adapter": {"rows": 0}}, ["adapter.rows", "0", "1"]),
    "too many rows to count": ({"adapter": {"rows": 10**20}}, ["adapter.rows", str(10**20), str(2**31)]),
    "no experts": ({"adapter": {"num_experts": 0}}, ["adapter.num_experts", "0", "1"]),
    "no experts a token": ({"adapter": {"experts_per_token": 0}}, ["adapter.experts_per_token", "0", "1"]),
    "no picks": ({"adapter": {"top_k": 0}}, ["adapter.top_k", "0", "1"]),
    "negative seed": ({"adapter": {"seed": -1}}, ["adapter.seed", "-1", "0"]),
    "seed too large for a generator": ({"adapter": {"seed": 2**70}}, ["adapter.seed", str(2**70), str(2**32)]),
    "unknown gate": ({"adapter": {"gate": "relu"}}, ["adapter.gate", "'relu'", "'softmax', 'sigmoid' or 'none'"]),
    "unknown start": ({"adapter": {"init_keys": "zero"}}, ["adapter.init_keys", "'zero'", "'ffn' or 'random'"]),
    "more experts a token than experts": (
        {"adapter": {"rows": 12, "num_experts": 3, "experts_per_token": 4}},
        ["adapter.experts_per_token", "4", "from 1 to 3"],
    ),
    "the same, derived": (
        {"adapter": {"rows": 7, "top_k": 1}},
        ["adapter.experts_per_token", "8", "derived from adapter.rows = 7", "from 1 to 7"],
    ),
    "softmax over one expert": (
        {"adapter": {"experts_per_token": 1}},
        ["adapter.gate", '"softmax"', "experts_per_token = 1", '"sigmoid" or "none"', "at least 2"],
    ),
    "top_k over the candidates": (
        {"adapter": {"rows": 30, "num_experts": 5, "experts_per_token": 2, "top_k": 13}},
        ["adapter.top_k", "13", "from 1 to 12"],
    ),
    "cap under top_k": (
        {"active_rows": {"cap": 15}},
        ["active_rows.cap", "15", "adapter.top_k = 28", "at least 28"],
    ),
    "no cap": ({"active_rows": {"cap": 0}}, ["active_rows.cap", "0", "1"]),
    "unknown overflow": (
        {"active_rows": {"on_overflow": "drop"}},
        ["active_rows.on_overflow", "'drop'", "'keep_largest' or 'raise'"],
    ),
    "unknown dtype": ({"offload": {"compute_dtype": "fp16"}}, ["offload.compute_dtype", "'fp16'", "'bf16' or 'fp32'"]),
    "lr_scale of zero": ({"optimizer": {"lr_scale": 0}}, ["optimizer.lr_scale", "0", "greater than 0"]),
    "lr_scale not finite": ({"optimizer": {"lr_scale": math.nan}}, ["optimizer.lr_scale", "nan", "finite"]),
    "lr_scale a word": ({"optimizer": {"lr_scale": "1"}}, ["optimizer.lr_scale", "'1'", "number"]),
    "unknown mode": ({"optimizer": {"mode": "eager"}}, ["optimizer.mode", "'eager'", "'lazy' or 'dense_equivalent'"]),
    "unknown moments": ({"optimizer": {"moments_dtype": "fp16"}}, ["moments_dtype", "'fp16'", "'fp32' or 'bf16'"]),
    "overlap a number": ({"optimizer": {"overlap": 1}}, ["optimizer.overlap", "1", "boolean"]),
    "two updates behind": ({"optimizer": {"max_staleness": 2}}, ["optimizer.max_staleness", "2", "equal to 1"]),
    "updates ahead": ({"optimizer": {"max_staleness": -1}}, ["optimizer.max_staleness", "-1", "equal to 0"]),
    "stale without overlap": (
        {"optimizer": {"max_staleness": 1, "overlap": False}},
        ["optimizer.max_staleness = 1", "optimizer.overlap = true", "no row is ever stale"],
    ),
    "no threads": ({"optimizer": {"num_threads": 0}}, ["optimizer.num_threads", "0", "equal to 1"]),
    "threads a fraction": ({"optimizer": {"num_threads": 1.5}}, ["optimizer.num_threads", "1.5", "integer"]),
    "no time": ({"optimizer": {"worker_timeout": 0}}, ["optimizer.worker_timeout", "0", "greater than 0"]),
    "all the time": ({"optimizer": {"worker_timeout": math.inf}}, ["optimizer.worker_timeout", "inf", "finite"]),
    "no time that is": ({"optimizer": {"worker_timeout": math.nan}}, ["optimizer.worker_timeout", "nan", "finite"]),
    "pin_memory a word": ({"offload": {"pin_memory": "yes"}}, ["offload.pin_memory", "'yes'", "boolean"]),
    "keys elsewhere": ({"offload": {"keys": "disk"}}, ["offload.keys", "'disk'", "'device' or 'host'"]),
    "int8 keys on the host": (
        {"offload": {"keys": "host", "keys_dtype": "int8"}},
        ["offload.keys_dtype", "int8", 'offload.keys = "host"', "leave it out"],
    ),
    "slots below none": ({"offload": {"slot_bytes": -1}}, ["offload.slot_bytes", "-1", "greater than or equal to 0"]),
    "rows of the device below none": (
        {"offload": {"resident_bytes": -1}},
        ["offload.resident_bytes", "-1", "equal to 0"],
    ),
    "rows of the device without keys there": (
        {"offload": {"keys": "host", "resident_bytes": 5}},
        ["offload.resident_bytes = 5", 'offload.keys = "device"'],
    ),
    "rows of the device that are brought to date": (
        {"offload": {"resident_bytes": 5}, "optimizer": {"mode": "dense_equivalent"}},
        ["offload.resident_bytes = 5", 'optimizer.mode = "dense_equivalent"', '"lazy"'],
    ),
    "rows of the device and old ones": (
        {"offload": {"resident_bytes": 5}, "optimizer": {"max_staleness": 1}},
        ["offload.resident_bytes = 5", "optimizer.max_staleness = 1", "use 0"],
    ),
    "huge_pages null": ({"offload": {"huge_pages": None}}, ["offload.huge_pages", "None", "boolean"]),
    "no memory for copies": ({"checkpoint": {"snapshot_bytes": 0}}, ["checkpoint.snapshot_bytes", "0", "1"]),
    "no checkpoint to keep": ({"checkpoint": {"keep_last": 0}}, ["checkpoint.keep_last", "0", "1"]),
    "save_base a word": ({"checkpoint": {"save_base": "no"}}, ["checkpoint.save_base", "'no'", "boolean"]),
    "auto for a number": ({"adapter": {"rows": "auto"}}, ["adapter.rows", '"auto"', "leave it out"]),
    "auto for a word": ({"adapter": {"gate": "auto"}}, ["adapter.gate", '"auto"', "leave it out"]),
    "auto for a list": ({"adapter": {"target_modules": "auto"}}, ["adapter.target_modules", '"auto"', "leave it out"]),
    "auto for a section": ({"offload": "auto"}, ["offload", '"auto"', "leave it out"]),
    "auto for layers": ({"adapter": {"layers_to_transform": "auto"}}, ["layers_to_transform", '"auto"', '"4-11"']),
    "layers a number": ({"adapter": {"layers_to_transform": 5}}, ["adapter.layers_to_transform =", "5", "list"]),
    "layers of words": (
        {"adapter": {"layers_to_transform": ["1"]}},
        ["adapter.layers_to_transform.0", "'1'", "integer"],
    ),
    "layers backwards": ({"adapter": {"layers_to_transform": "9-3"}}, ["layers_to_transform", '"9-3"', '"4-11"']),
    "layers without an end": ({"adapter": {"layers_to_transform": "9-"}}, ["layers_to_transform", '"9-"', '"4-11"']),
    "layers with a gap": ({"adapter": {"layers_to_transform": "1-3-5"}}, ["layers_to_transform", '"1-3-5"', "list"]),
    "layers one word": ({"adapter": {"layers_to_transform": "3"}}, ["layers_to_transform", '"3"', '"4-11"']),
    "layers in odd digits": ({"adapter": {"layers_to_transform": "²-3"}}, ["layers_to_transform", '"²-3"', '"4-11"']),
    "the same at the end": ({"adapter": {"layers_to_transform": "2-³"}}, ["layers_to_transform", '"2-³"', '"4-11"']),
    "no layers": ({"adapter": {"layers_to_transform": []}}, ["adapter.layers_to_transform", "[]", "null for all"]),
    "modules a word": ({"adapter": {"target_modules": "mlp"}}, ["adapter.target_modules", "'mlp'", "list"]),
    "modules no pattern": ({"adapter": {"target_modules": ["("]}}, ["adapter.target_modules", '"("', "backslash"]),
    "block a list": ([], ["[]", "object"]),
    "block true": (True, ["True", "object"]),
    "block null": (None, ["None", "object"]),
    "block auto": ("auto", ["'auto'", "object"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_block_gets_a_sentence(name):
    block, expected = BAD[name]
    message = complaint(block)
    for part in expected:
        assert part in message, (part, message)


@pytest.mark.parametrize(
    "layers, num_layers, outside",
    [([0, 3], 3, 3), ([-1, 0], 3, -1), ("1-7", 5, 7), ("5-7", 5, 5), ("0-99999999999999", 5, 99999999999999)],
)
def test_a_layer_that_the_model_lacks_gets_a_sentence(layers, num_layers, outside):
    config = MeftConfig.from_block({"adapter": {"layers_to_transform": layers}})
    expected = rf"adapter.layers_to_transform names layer {outside}, .* 0 to {num_layers - 1}$"
    with pytest.raises(MeftConfigError, match=expected):
        config.adapter.layer_indices(num_layers)


def test_layers_as_all_a_list_or_a_range():
    def layers(value: object) -> list[int] | None:
        indices = MeftConfig.from_block({"adapter": {"layers_to_transform": value}}).adapter.layer_indices(12)
        return None if indices is None else sorted(indices)

    assert layers(None) is None
    assert layers([7, 2, 2]) == [2, 7]
    assert layers("4-11") == [4, 5, 6, 7, 8, 9, 10, 11]
    assert layers(" 3 - 3 ") == [3]


@given(rows=st.integers(1, 3000), experts=st.integers(2, 300))
def test_rows_that_experts_do_not_divide(rows, experts):
    """The counts that the sentence offers are divisible, and none between them and ``rows`` is."""
    assume(rows % experts)
    message = complaint({"adapter": {"rows": rows, "num_experts": experts}})
    assert f"adapter.rows = {rows} " in message and f"adapter.num_experts = {experts};" in message
    offered = [int(number) for number in re.findall(r"\d+", message.partition(";")[2])]
    around = range(max(1, rows - experts), rows + experts + 1)
    divisible = [count for count in around if count % experts == 0]
    below, above = [c for c in divisible if c < rows], [c for c in divisible if c > rows]
    assert offered == below[-1:] + above[:1]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_experts_are_the_divisor_nearest_to_where_routing_is_cheapest(n):
    for rows in range(1, 400):
        divisors = [d for d in range(1, rows + 1) if rows % d == 0]
        allowed = [d for d in divisors if d >= n] or divisors
        chosen = derived_num_experts(rows, n)
        assert chosen in allowed
        nearest = min(abs(d - math.sqrt(n * rows / 2)) for d in allowed)
        assert abs(chosen - math.sqrt(n * rows / 2)) == pytest.approx(nearest)


def test_derived_experts_of_usual_sizes():
    assert [derived_num_experts(rows, 8) for rows in (1024, 4096, 8192, 16384, 65536)] == [64, 128, 128, 256, 512]
    assert derived_num_experts(8192, 4) == 128 and derived_num_experts(2**31 - 1, 1) == 1
    assert derived_num_experts(10, 8) == 10  # 5 is nearer, but less than a token's experts


def test_defaults_are_the_designed_ones_and_the_readmes():
    assert MeftConfig().model_dump() == DESIGNED
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert json.loads("{" + readme.partition("```json\n")[2].partition("```")[0] + "}")["meft"] == DESIGNED
    assert MeftConfig.from_block({}) == MeftConfig()


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"adapter": {"rows": 35, "experts_per_token": 2, "top_k": 3, "layers_to_transform": "0-1"}},
        {"adapter": {"layers_to_transform": [2], "target_modules": ["mlp"]}, "active_rows": {"cap": 99}},
        {"enabled": False, "optimizer": {"lr_scale": 3}, "offload": {"compute_dtype": "bf16"}},
        {"optimizer": {"max_staleness": 1, "num_threads": 3, "worker_timeout": 2}, "offload": {"huge_pages": True}},
        {"optimizer": {"mode": "dense_equivalent", "moments_dtype": "bf16", "overlap": False}},
    ],
)
def test_resolved_values_go_through_json_and_back(block):
    resolved = MeftConfig.from_block(block).resolved()
    again = MeftConfig.from_block(json.loads(json.dumps(resolved)))
    assert again.resolved() == resolved
    assert resolved["active_rows"]["cap"] == block.get("active_rows", {}).get("cap", resolved["adapter"]["rows"])
    shape = resolved["adapter"]
    assert shape["num_experts"] == derived_num_experts(shape["rows"], shape["experts_per_token"])
    threads = block.get("optimizer", {}).get("num_threads")
    assert resolved["optimizer"]["num_threads"] == (threads or len(rank_cores())) >= 1
    for section, given_values in block.items():
        if isinstance(given_values, dict):
            assert given_values.items() <= resolved[section].items()


@pytest.mark.parametrize(
    ("settings", "on_cpu", "on_gpu"),
    [({}, False, True), ({"overlap": True}, True, True), ({"overlap": False}, False, False)]
    + [({"max_staleness": 1}, True, True)],
)
def test_updates_overlap_where_the_cores_have_nothing_else_to_do(settings, on_cpu, on_gpu):
    chosen = MeftConfig.from_block({"enabled": True, "optimizer": settings}).optimizer
    assert (chosen.overlaps("cpu"), chosen.overlaps("cuda:0")) == (on_cpu, on_gpu)


def test_absent_and_disabled_blocks_are_none():
    assert find_block({}) is None
    assert find_block({"train_batch_size": 4, "zero_optimization": {"stage": 2}}) is None
    assert find_block({"meft": {"enabled": False}}) is None
    assert find_block({"meft": {}}) == MeftConfig()


@pytest.mark.parametrize("key", ["MEFT", "meft ", "mefts", "metf", "mfet", "mef", "meft_config"])
def test_a_block_under_the_wrong_key(key):
    with pytest.raises(MeftConfigError, match=rf'"{key}".* "meft"$'):
        find_block({"train_batch_size": 4, key: {"enabled": True}})


def test_a_nested_block():
    with pytest.raises(MeftConfigError, match='"meft" stands inside "zero_optimization"; .* top level'):
        find_block({"zero_optimization": {"stage": 2, "meft": {}}})


def test_deepspeed_keys_are_not_taken_for_the_block():
    keys = ["fp16", "bf16", "amp", "optimizer", "scheduler", "zero_optimization", "monitor_config", "tensorboard"]
    assert find_block({key: {} for key in [*keys, "comet", "wandb", "moe", "elasticity", "autotuning", "aio"]}) is None
    assert find_block({"method": "meft", "mef": 3}) is None


def test_every_field_is_documented_where_it_is_defined():
    """A section's own docstring documents the field that holds it."""
    tree = ast.parse(inspect.getsource(config_module))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    seen = set()
    for name, node in classes.items():
        if not hasattr(getattr(config_module, name), "model_fields"):
            continue
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                section = classes.get(ast.unparse(field.annotation))
                assert documented or (section and ast.get_docstring(section)), f"{name}.{field.target.id}"
                seen.add((name, field.target.id))
    defined = {(name, field) for name in classes for field in getattr(getattr(config_module, name), "model_fields", ())}
    assert seen == defined and len(seen) > 15
