"""What a plan says is what a run takes, and what the command makes of it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from meft_engine.cli import main
from meft_engine.config import AdapterConfig, MeftConfigError
from meft_engine.planner import ModelShape, plan_run
from meft_engine.planner.command import size
from meft_engine.planner.measure import Speeds
from meft_engine.planner.model_shape import imagined, shape_of
from meft_engine.planner.trace import trace_base
from tests.families import FAMILIES, tiny_block, tiny_llama
from tests.integration.engines import batch, build_engine, ds_config, train_step
from tests.integration.kept import kept_by_autograd, use_linear_layers
from tests.late_copies import use_late_device

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
ROWS = ("compute_copies", "lower_planes", "moments", "steps")
SPEEDS = Speeds(tflops=1.0, host_gbps=10.0, device_gbps=10.0, pcie_gbps=10.0, network_gbps=1.0)
LLAMA_2_7B = ModelShape(layers=32, width=4096, intermediate=11008, vocabulary=32000, parameters=6_738_415_616)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a model's configuration, without weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama().config.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("sections", "bf16"),
    [
        ({}, False),
        ({"offload": {"compute_dtype": "bf16"}, "optimizer": {"moments_dtype": "bf16"}}, False),
        ({"optimizer": {"mode": "dense_equivalent"}}, True),
    ],
    ids=str,
)
def test_rows_and_device_are_as_planned_to_the_byte(sections, bf16, folder, monkeypatch):
    use_late_device(monkeypatch.setattr)
    adapter = {"rows": 350, "num_experts": 10, "layers_to_transform": [0, 2]}
    config = ds_config(tiny_block(adapter, **sections), bf16=bf16)
    planned = plan_run(config, folder, sequence_length=12, device="cuda", device_memory=1 << 40)
    engine = build_engine(tiny_llama(), config["meft"], bf16=bf16)
    train_step(engine, [batch(0)])
    report = engine.meft_report()
    assert sum(planned.host[kind] for kind in ROWS) == report["host_bytes"]
    for kind, count in report["device_bytes_by_kind"].items():
        assert planned.device[kind] == count, kind
    assert planned.as_dict()["adapter_parameters"] == report["adapter_parameters"]
    assert planned.as_dict()["model"]["parameters"] == report["base_parameters"]
    engine.destroy()


def test_a_checkpoint_takes_what_is_planned(folder, tmp_path):
    """Within a twentieth, and four kilobytes for names and manifests in each file."""
    config = ds_config(tiny_block({"rows": 7000, "num_experts": 10}))
    engine = build_engine(tiny_llama(), config["meft"])
    train_step(engine, [batch(0)])
    engine.save_checkpoint(str(tmp_path), "one")
    engine.destroy()
    files = [path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file()]
    planned = plan_run({**config, "meft": {**config["meft"], "checkpoint": {"keep_last": 3}}}, folder)
    assert planned.disk_per_checkpoint == pytest.approx(sum(files), rel=0.05, abs=4096 * len(files))
    assert planned.disk_in_all == 4 * planned.disk_per_checkpoint


def test_resident_memory_of_a_process_at_its_worst_moment(tmp_path):
    """Of a model of some size, within a twentieth; predicted before the process starts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from plan import CASES, model_folder, said_of

    case = CASES[3]
    model = model_folder("llama", tmp_path)
    options = {"sequence_length": case.length, "host_memory": 1 << 50}
    on_host = plan_run(case.config(), model, device="cpu", speeds=SPEEDS, **options)
    said = said_of(on_host, on_host, ())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_contestant.py"), "3", model, "1", "host"]
    pipes = {"input": "\n\n", "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, cwd=ROOT, **pipes)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert said["host_rows"] == pytest.approx(found["host_rows"], rel=0.05)
    assert said["host_peak"] == pytest.approx(found["host_peak"], rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_without_weights(family):
    """Parameters exactly; and it can be run in imagination, which keeps more without checkpointing than with it."""
    built = FAMILIES[family].build()
    with imagined(built.config) as model:
        shape = shape_of(model, AdapterConfig())
    assert shape.parameters == sum(p.numel() for p in built.parameters())
    assert len(shape.ffn_widths) == len(FAMILIES[family].ffns) and set(shape.ffn_widths) == {32}
    traces = []
    for checkpointing in (False, True):
        with imagined(built.config, dtype=torch.bfloat16) as model:
            traces.append(trace_base(model, 2, 12, gradient_checkpointing=checkpointing))
    assert traces[0].kept > traces[1].kept > 0 and traces[0].peak > traces[0].kept
    assert traces[1].backward_flops > traces[0].backward_flops > 0


@pytest.mark.parametrize("stage_3", [False, True])
def test_an_imagined_run_keeps_and_computes_what_a_real_one_does(stage_3, monkeypatch):
    """Autograd's own account of a real forward, and operations by the sizes of weights."""
    real = tiny_llama()
    # What is planned is another process, which has layers of its own.
    use_linear_layers(not stage_3, monkeypatch)
    with imagined(real.config) as model:
        before, trace = functional.linear, trace_base(model, 4, 12, keeps_inputs=stage_3)
    assert functional.linear is before
    measured = sum(kept_by_autograd(real, batch(0), stage_3, monkeypatch).values())
    assert trace.kept == pytest.approx(measured, rel=0.05)
    products = [p for name, p in real.named_parameters() if p.dim() == 2]
    linear = 2 * 48 * sum(p.numel() for p in products)
    attention = 3 * 2 * 2 * 4 * 12 * 12 * 32
    assert trace.forward_flops == pytest.approx(linear + attention, rel=0.01)
    assert sum(2 * m * k * n * count for m, k, n, count in trace.products) >= 2 * linear


def test_checkpointed_layers_are_computed_again_one_at_a_time():
    """However seldom Python looks for garbage, of which what they keep would be a part."""
    peaks = []
    gc.disable()
    try:
        for layers in (4, 24):
            with imagined(tiny_llama(num_hidden_layers=layers).config) as model:
                peaks.append(trace_base(model, 4, 12, gradient_checkpointing=True).peak)
    finally:
        gc.enable()
    assert peaks[1] - peaks[0] == pytest.approx(20 * 48 * 32 * 4, rel=0.1)  # of each more, its input


def test_a_heap_keeps_a_part_of_what_checkpointed_layers_free(folder):
    config = {"train_micro_batch_size_per_gpu": 4, "meft": {"adapter": {"rows": 1024}}}

    def heap(device: str, checkpointing: bool) -> int:
        options = {"device": device, "device_memory": 1 << 40, "gradient_checkpointing": checkpointing}
        return plan_run(config, folder, sequence_length=64, **options).trace.heap_peak

    assert heap("cuda", True) < heap("cpu", True) < heap("cpu", False) == heap("cuda", False)


def test_stage_3_keeps_inputs_of_linear_layers(folder):
    def activations(stage: int, checkpointing: bool = False, **zero) -> int:
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage, **zero}}
        config |= {"bf16": {"enabled": True}, "meft": {"adapter": {"rows": 1024}}}
        options = {"device": "cuda", "device_memory": 1 << 40, "gradient_checkpointing": checkpointing}
        return plan_run(config, folder, sequence_length=64, **options).device["activations"]

    # Of each of three layers the inputs of queries, keys and values and of the down projection, and that of the head.
    assert activations(3) - activations(2) == 4 * 64 * 2 * (3 * (32 + 48) + 32)
    assert activations(3, memory_efficient_linear=False) == activations(2)
    assert activations(2, True) <= activations(3, True) < activations(2)


def test_stage_3_gathers_what_is_not_there(folder):
    def gathered(gpus: int, device: str = "cuda", **zero) -> int:
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, **zero}}
        config["meft"] = {"adapter": {"rows": 1024}}
        found = plan_run(config, folder, gpus=gpus, device=device, device_memory=1 << 40, sequence_length=16)
        return (found.device or found.host).get("gathered", 0)

    whole = 4 * sum(p.numel() for p in tiny_llama().parameters())
    offloaded, few = {"offload_param": {"device": "cpu"}}, {"stage3_max_live_parameters": 1}
    assert [gathered(2), gathered(2, "cpu")] == [whole, 2 * whole]  # of one device, and of a host with two ranks
    assert [gathered(1), gathered(1, "cpu"), gathered(1, "cpu", **offloaded)] == [0, 0, 0]
    assert gathered(1, **offloaded) == whole
    assert 0 < gathered(2, **few) < whole
    # Then autograd holds on to the weights.
    assert gathered(2, **few, memory_efficient_linear=False) == whole


def test_sizes_follow_ranks_and_zero(folder):
    """A node holds one adapter's copies however many ranks it has, and its part of the rest."""
    block = {"adapter": {"rows": 1024}}

    def planned(gpus: int, nodes: int, **zero):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "meft": block,
        }
        return plan_run(
            config, folder, gpus=gpus, nodes=nodes, device="cuda", device_memory=1 << 40, sequence_length=16
        )

    one, four, far = planned(1, 1), planned(4, 1), planned(4, 2)
    assert one.network == {} and four.network["out_of_a_node"] == 0 < far.network["out_of_a_node"]
    assert one.host["compute_copies"] == four.host["compute_copies"] == far.host["compute_copies"]
    assert one.host["moments"] == four.host["moments"] == 2 * far.host["moments"]
    assert far.network["updated_rows"] > 0 == four.network["updated_rows"]
    third = planned(4, 1, stage=3, stage3_max_live_parameters=1)
    assert third.device["base"] == one.device["base"] // 4 and third.network["base_gathers"] > 0
    assert 0 < third.device["gathered"] < one.device["base"]
    assert planned(4, 1, stage=2).device["zero_buckets"] == 2 * 500_000_000
    assert planned(4, 1, stage=2, reduce_bucket_size=1000).device["zero_buckets"] == 2000
    offloaded = planned(4, 1, stage=3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    assert offloaded.device["base"] == 0 and offloaded.host["base"] == one.device["base"]
    assert offloaded.device["routers"] < one.device["routers"] and offloaded.host["deepspeed_optimizer"] > 0


def test_seconds_follow_the_machine(folder):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "meft": {"adapter": {"rows": 1024}},
    }
    fast = Speeds(2.0, 20.0, 20.0, 20.0, 2.0)
    times = [plan_run(config, folder, device="cpu", speeds=speeds).step for speeds in (SPEEDS, fast)]
    assert times[0].seconds == pytest.approx(2 * times[1].seconds) and times[0].seconds > 0
    bus = plan_run(config, folder, device="cuda", device_memory=1 << 40, speeds=SPEEDS)
    assert bus.step.parts["pcie"] == pytest.approx(sum(bus.pcie.values()) / 1e10)
    assert bus.step.hidden >= min(bus.step.parts["pcie"], bus.step.parts["base_forward"])
    # Twice as many micro-batches compute twice as long, and are updated once.
    once = plan_run({**config, "gradient_accumulation_steps": 1}, folder, device="cpu", speeds=SPEEDS).step
    for part in ("base_forward", "base_backward", "adapter"):
        assert times[0].parts[part] == pytest.approx(2 * once.parts[part])
    assert once.parts["update"] <= times[0].parts["update"] < 2 * once.parts["update"]
    assert times[0].hidden == 0.0
    waiting = {**config, "meft": {**config["meft"], "optimizer": {"overlap": False}}}
    exposed = plan_run(waiting, folder, device="cuda", device_memory=1 << 40, speeds=SPEEDS).step
    assert exposed.seconds - bus.step.seconds == pytest.approx(
        min(bus.step.parts["update"], bus.step.parts["base_forward"] / 2)
    )
    assert plan_run(config, folder, device="cpu").step is None


def test_more_touched_rows_cost_more(folder):
    config = {"train_micro_batch_size_per_gpu": 1, "meft": {"adapter": {"rows": 8192}}}
    few, many = (
        plan_run(config, folder, device="cuda", device_memory=1 << 40, touched_share=share, speeds=SPEEDS)
        for share in (0.1, 0.5)
    )
    assert many.pcie["gradients_to_host"] == pytest.approx(5 * few.pcie["gradients_to_host"], rel=1e-6)
    assert many.step.parts["update"] == pytest.approx(5 * few.step.parts["update"])
    capped = plan_run({**config, "meft": {**config["meft"], "active_rows": {"cap": 512}}}, folder, touched_share=0.5)
    assert capped.touched_share == 512 / 8192


def run(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


def test_the_command_says_that_it_fits_or_what_would(folder, tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config(tiny_block({"rows": 8000, "num_experts": 10}), stage=2)))
    common = (path, "--model", folder, "--sequence_length", 12, "--no_time")
    assert run(*common, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["problems"] == [] and found["host_bytes"]["moments"] == 3 * 2 * 8000 * 32 * 8
    assert run(*common, "--device_memory", "1GB", "--host_memory", "64GB") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: device memory: 2.5 GiB are needed on each device (zero buckets 1.9" in text
    assert "it would fit with zero_optimization.reduce_bucket_size = " in text


def test_fit_writes_a_whole_configuration_that_fits(folder, tmp_path, capsys):
    """Rows go last; everything else in the file stays as it was."""
    path, fitting = tmp_path / "ds.json", tmp_path / "fits.json"
    config = ds_config(tiny_block({"rows": 500_000, "num_experts": 1000, "top_k": 3}), stage=2)
    path.write_text(json.dumps(config))
    common = ("--model", folder, "--sequence_length", 12, "--no_time")
    limits = ("--fit", "700MB", "--host_memory", "2500MB")
    assert run(path, *common, *limits, "--output", fitting) == 0
    said = capsys.readouterr().out.splitlines()[-2]
    assert "adapter.rows = " in said and said.count("train_micro_batch_size_per_gpu = 1 ") == 1
    assert said.count("train_micro_batch_size_per_gpu") == 1
    written = json.loads(fitting.read_text())
    rows = written["meft"]["adapter"].pop("rows")
    assert 1000 <= rows < 500_000 and rows % 1000 == 0
    assert {key: written[key] for key in ("optimizer", "bf16")} == {key: config[key] for key in ("optimizer", "bf16")}
    assert written["meft"]["router"] == config["meft"]["router"]
    capsys.readouterr()
    again = ("--device_memory", "700MB", "--host_memory", "2500MB", "--gradient_checkpointing")
    assert run(fitting, *common, *again) == 0
    # With one step of rows more, it would not.
    written["meft"]["adapter"]["rows"] = rows + 1000
    fitting.write_text(json.dumps(written))
    assert run(fitting, *common, *again) == 1


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"meft": {"adapter": {"rowz": 1}}, "train_micro_batch_size_per_gpu": 1}, (), "did you mean"),
        ({"train_micro_batch_size_per_gpu": 1}, (), 'no enabled "meft" block'),
        ({"meft": {}, "train_micro_batch_size_per_gpu": "auto"}, (), "--batch_size"),
        ({"meft": {}, "train_micro_batch_size_per_gpu": 2}, ("--batch_size", 3), "leave one of them out"),
        ({"meft": {}, "train_micro_batch_size_per_gpu": 2}, ("--device_memory", "24 parsecs"), "24GB"),
        ({"meft": {}, "train_micro_batch_size_per_gpu": 2}, ("--fit", "24GB"), "--output"),
        ({"meft": {}, "train_micro_batch_size_per_gpu": 2}, ("--touched_share", 2), "no share"),
        ({"meft": {}, "train_micro_batch_size_per_gpu": 2}, ("--gpus", 0), "--gpus = 0"),
        ({"meft": {"adapter": {"layers_to_transform": [9]}}, "train_micro_batch_size_per_gpu": 2}, (), "layer 9"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(config, options, words, folder, tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert run(path, "--model", folder, "--no_time", *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("meft-engine plan: ") and words in message and "\n" not in message


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert run(CONFIGS / "meft_24gb.json", "--model", tmp_path) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert run(tmp_path / "none.json", "--model", tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_auto_is_asked_of_the_command(folder, capsys):
    options = ("--model", folder, "--batch_size", 2, "--dtype", "bf16", "--device", "cpu", "--no_time", "--json")
    assert run(CONFIGS / "demo_cpu.json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["base_dtype"] == "bfloat16" and found["run"]["tokens_of_micro_batch"] == 1024


def test_a_shape_alone_is_planned_by_formula():
    config = json.loads((CONFIGS / "meft_24gb.json").read_text())
    plan = plan_run(
        config, LLAMA_2_7B, sequence_length=256, device="cuda", device_memory=24 * 10**9, host_memory=64 << 30
    )
    assert 12.5 < plan.device["base"] / 2**30 < 12.7 and any("by a formula" in text for text in plan.assumptions)
    assert plan.host["moments"] == 16 << 30
    with pytest.raises(MeftConfigError, match="layer 32"):
        plan_run({**config, "meft": {"adapter": {"layers_to_transform": [32]}}}, LLAMA_2_7B)


def test_sizes_are_read_as_they_are_written():
    assert (size("24GB", "x"), size("24 GiB", "x"), size("1.5g", "x"), size("7", "x")) == (
        24 * 10**9,
        24 << 30,
        1_500_000_000,
        7,
    )


def test_the_benchmark_says_what_is_missed():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from plan import CASES, Compared, figures_of

    said = {"host_rows": 100.0, "host_peak": 94.0, "device": 104.0, "step": 1.29}
    took = {"host_rows": 100.0, "host_peak": 100.0, "device": 100.0, "step": 1.0}
    found = figures_of([Compared(CASES[0], said, took), Compared(CASES[1], took, took)])
    assert found["worst_host_peak"] == 0.06 and found["worst_step"] == 0.29 and found["missed"] == ["host_peak"]
    assert found["off"][CASES[0].name]["device"] == 0.04
