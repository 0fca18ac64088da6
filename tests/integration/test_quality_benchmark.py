"""What benchmarks/quality.py rests on: its data, how it examines, counts and chooses, and that it goes on."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quality
import quality_page
import torch
from learning import conduct, methods, runner, sparsity, tables, variants
from learning.corpus import Passages
from learning.plan import Comparison, Entry
from learning.runner import Result, Runner
from learning.top_layers import TopLayers
from learning.trial import Trial

from meft_engine.config import MeftConfig
from meft_kernels import sparse
from tests.families import tiny_llama

FIRST_LAYER = 1


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return str(folder)


def passages_of(model: Any, ids: list[list[int]], learned: int) -> Passages:
    """Passages whose last ``learned`` tokens are to be learned, with what the layers below FIRST_LAYER make of them."""
    seen: list[torch.Tensor] = []
    hook = model.model.layers[FIRST_LAYER].register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach()))
    labels = []
    for example in ids:
        model(input_ids=torch.tensor([example]))
        labels += [-100] * (len(example) - learned) + example[-learned:]
    hook.remove()
    ends = torch.tensor([len(example) for example in ids]).cumsum(0).tolist()
    return Passages(torch.cat(seen), torch.tensor(labels), ends)


def test_the_top_of_the_model_over_cached_states_is_the_model(model_folder):
    whole = tiny_llama()
    ids = [[5, 9, 3, 7, 11, 4], [8, 6, 12], [3, 3, 10, 5, 9, 6, 7, 4]]
    top = TopLayers(model_folder, FIRST_LAYER)
    batch = passages_of(whole, ids, 2).batch([2, 0, 1])
    assert batch.attention_mask.sum(1).tolist() == [8, 6, 3]
    logits, targets, owners = top.predictions(batch.hidden, batch.attention_mask, batch.labels)
    assert owners.tolist() == [0, 0, 1, 1, 2, 2] and targets.tolist() == [7, 4, 11, 4, 6, 12]
    expected = [whole(input_ids=torch.tensor([ids[i]])).logits[0, -3:-1] for i in (2, 0, 1)]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)


def test_exact_match_by_one_forward_is_that_of_greedy_generation(model_folder):
    whole, answer = tiny_llama().eval(), 2
    prompts = [[5, 9, 3, 7], [8, 6, 12], [3, 10, 5, 9, 6], [4, 4, 8, 9]]
    answers = [
        whole.generate(torch.tensor([p]), max_new_tokens=answer, do_sample=False, eos_token_id=-1)[0, len(p) :].tolist()
        for p in prompts
    ]
    answers[1][1] = (answers[1][1] + 1) % 30  # wrong at its end
    answers[3][0] = (answers[3][0] + 1) % 30  # wrong at its beginning
    passages = passages_of(whole, [p + a for p, a in zip(prompts, answers, strict=True)], answer)
    found = conduct.examine(TopLayers(model_folder, FIRST_LAYER).eval(), passages)
    assert found["exact_match"] == 0.5


def test_the_mass_of_rows_counts_valid_picks_alone():
    selection = sparse.Selection(
        experts=torch.tensor([[0], [1]]),
        active=torch.tensor([2, 5]),
        picks=torch.tensor([[0, 1], [1, 0]]),
        slots=torch.zeros(2, 2, dtype=torch.int64),
        valid=torch.tensor([[True, True], [True, False]]),
    )
    mass = sparsity.mass_of_rows(selection, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), 7)
    assert mass.tolist() == [0, 0, 1, 0, 0, 6, 0]


@pytest.mark.parametrize("groups", [1, 3, 6, 12])
def test_keys_that_are_alike_are_put_together_in_groups_of_equal_size(groups):
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(groups, 16, generator=generator)
    mixed = torch.randperm(24, generator=generator) % groups
    keys = directions[mixed] + 0.01 * torch.randn(24, 16, generator=generator)
    order = variants.alike(keys, groups, generator)
    assert sorted(order.tolist()) == list(range(24))
    if groups in (1, 24):
        return
    together = sum(len(set(group.tolist())) == 1 for group in mixed[order].view(groups, -1))
    assert together >= groups - 2  # k-means may start with two centers in one cluster


@pytest.fixture
def engine(model_folder):
    adapter = {"rows": 96, "num_experts": 12, "experts_per_token": 3, "top_k": 6, "init_keys": "ffn"}
    built = methods.build(Trial("meft", adapter=adapter), TopLayers(model_folder, FIRST_LAYER), lambda optimizer: None)
    yield built
    built.destroy()


@pytest.mark.parametrize("noise, cosine", [(0.01, 1.0), (0.5, 0.894), (1000.0, 0.0)])
def test_keys_of_other_noise_are_as_large(noise, cosine, engine):
    adapters, ffns = engine.meft_adapters.adapters, engine.meft_adapters.ffns
    sizes = {name: float(adapter.keys.master.norm()) for name, adapter in adapters.items()}
    variants.apply({"key_noise": noise}, engine, seed=5)
    for name, adapter in adapters.items():
        keys, rows = adapter.keys.master, ffns[name].gate_weight
        assert float(keys.norm()) == pytest.approx(sizes[name], rel=0.05)
        found = torch.nn.functional.cosine_similarity(keys, rows.repeat(2, 1)).mean()
        assert float(found) == pytest.approx(cosine, abs=0.06)
        torch.testing.assert_close(adapter.router.detach(), keys.view(12, 8, -1).mean(1))


@pytest.mark.parametrize(
    "name, value, changes",
    [
        ("key_order", "alike", "keys router"),
        ("key_order", "random", "keys router"),
        ("router_init", "random", "router"),
        ("router_scale", 3.0, "router"),
    ],
)
def test_variants_change_what_they_are_about(name, value, changes, engine):
    def parts() -> dict[str, torch.Tensor]:
        adapter = next(iter(engine.meft_adapters.adapters.values()))
        return {"keys": adapter.keys.master.clone(), "router": adapter.router.detach().clone()}

    before = parts()
    variants.apply({name: value}, engine, seed=5)
    after = parts()
    assert {part for part in before if not torch.equal(before[part], after[part])} == set(changes.split())
    if name == "key_order":
        assert sorted(map(tuple, after["keys"].tolist())) == sorted(map(tuple, before["keys"].tolist()))
        torch.testing.assert_close(after["router"], after["keys"].view(12, 8, -1).mean(1))
    elif name == "router_scale":
        torch.testing.assert_close(after["router"], 3 * before["router"])
    else:
        assert float(after["router"].norm()) == pytest.approx(float(before["router"].norm()), rel=0.2)


def test_an_unknown_variant_is_named(engine):
    with pytest.raises(ValueError, match="variant 'other' is none of key_noise, key_order"):
        variants.apply({"other": 1}, engine, seed=5)


def result(method: str, match: float, perplexity: float, **trial: Any) -> Result:
    return Result(Trial(method, **trial), {"trained_exact_match": match, "perplexity_after": perplexity})


def test_loras_perplexity_at_equal_exact_match():
    """Along the trials that none beats in both, straight lines; outside of them, the nearest."""
    found = [(0.2, 30.0), (0.4, 50.0), (0.3, 90.0), (0.8, 130.0), (0.7, 400.0)]
    entries = [Entry("methods", "lora", result("lora", *pair)) for pair in found]
    entries.append(Entry("methods", "meft", result("meft", 0.9, 1.0)))
    at = [tables.lora_perplexity_at(match, entries) for match in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.95)]
    assert at == pytest.approx([30, 30, 40, 50, 90, 130, 130])


def test_the_best_rate_has_one_result_for_each_seed():
    rates = [Entry("methods", "lora", result("lora", 0.1, 1, learning_rate=rate)) for rate in (1e-3, 2e-3)]
    more = [Entry("methods", "lora", result("lora", 0.1, 1, learning_rate=2e-3, seed=seed)) for seed in (1, 2)]
    found = Comparison(rates + more, {"lora": rates[1].result.trial}).results("lora")
    assert [r.trial.seed for r in found] == [0, 1, 2]


def test_settings_tell_trials_apart():
    trial = Trial("meft", adapter={"top_k": 4})
    changed = trial.but(adapter={"rows": 64}, router={"lr_scale": 0.1}, seed=3)
    assert changed.adapter == {"top_k": 4, "rows": 64} and trial.adapter == {"top_k": 4}
    assert changed.settings == "top_k = 4, rows = 64, router.lr_scale = 0.1"
    assert changed.block["adapter"] == {"top_k": 4, "rows": 64, "seed": 3}
    assert len({trial.key, changed.key, trial.but(seed=1).key, trial.but(facts=7).key}) == 4
    assert Trial(**json.loads(json.dumps(asdict(changed)))).key == changed.key


def test_lora_gets_the_rank_that_fills_the_bytes(model_folder):
    layers = TopLayers(model_folder, FIRST_LAYER).model.layers
    per_rank = sum(
        sum(module.weight.shape)
        for name, module in layers.named_modules()
        if name.split(".")[-1] in methods.LORA_MODULES
    )
    assert methods.lora_rank_of_bytes(16 * per_rank * 5.2, layers) == 5
    assert methods.lora_rank_of_bytes(1, layers) == 1


class Counting(Runner):
    """Conducts trials in its own process, with whatever comes to mind."""

    def _conduct(self, trials: list[Trial], title: str) -> None:
        for trial in trials:
            if trial.seed == 13:
                raise RuntimeError("interrupted")
            self.conducted = [*getattr(self, "conducted", []), trial.seed]
            self._keep(trial, {"seed": trial.seed})


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trials = [Trial("meft", seed=seed) for seed in (1, 2, 13, 3)]
    first = Counting("model", 0, tmp_path, cores=[0])
    with pytest.raises(RuntimeError):
        first.run(trials, "")
    second = Counting("model", 0, tmp_path, cores=[0])
    wanted = [trial for trial in trials if trial.seed != 13]
    assert [r["seed"] for r in second.run([*wanted, wanted[0]], "")] == [1, 2, 3, 1]
    assert first.conducted == [1, 2] and second.conducted == [3]

    monkeypatch.setattr(runner, "_digest_of_sources", lambda: "other code")
    third = Counting("model", 0, tmp_path, cores=[0])
    third.run(wanted, "")
    assert third.conducted == [1, 2, 3]
    monkeypatch.setattr(runner, "_digest_of_sources", lambda: "still other code")
    fourth = Counting("model", 0, tmp_path, cores=[0], any_code=True)
    fourth.run(wanted, "")
    assert not hasattr(fourth, "conducted")


@pytest.mark.parametrize("scale, rates", [(None, {1e-3}), (4.0, {1e-3, 4e-3})])
def test_values_of_dense_adapters_learn_as_much_faster_as_the_trial_says(scale, rates, model_folder):
    model = TopLayers(model_folder, FIRST_LAYER)
    methods.add_dense_adapters(model, 40, 0)
    variant = {} if scale is None else {"value_lr_scale": scale}
    groups = methods._groups(model, Trial("dense", learning_rate=1e-3, rows=40, variant=variant))
    rate_of = {id(p): group.get("lr", 1e-3) for group in groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(rate_of) == len(trained) and set(rate_of.values()) == rates
    assert {rate_of[id(p)] for name, p in trained if name.endswith("values")} == {1e-3 * (scale or 1)}
    assert {rate_of[id(p)] for name, p in trained if not name.endswith("values")} == {1e-3}


def test_methods_learn_through_one_loop(model_folder, tmp_path, monkeypatch):
    """Each method, conducted whole on a tiny model and few passages: losses fall, and what has to be found is."""
    whole = tiny_llama()
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(3, 30, (6,), generator=generator).tolist() for _ in range(9)]
    facts = passages_of(whole, draw, 2)
    text = passages_of(whole, [[5, 8, 9, 20, 4, 6, 7, 9]] * 2, 8)
    monkeypatch.setattr(
        conduct, "_loaded", lambda path: SimpleNamespace(trained=facts, second_wording=facts, text=text)
    )
    conduct._perplexity_before.cache_clear()
    common = {"facts": 9, "batch_size": 4, "epochs": 12, "learning_rate": 2e-2}
    trials = [
        Trial("meft", **common, adapter={"rows": 40, "num_experts": 10, "experts_per_token": 3, "top_k": 6}),
        Trial("lora", **common, rank=4),
        Trial("dense", **common, rows=40, variant={"center_inputs": True, "value_lr_scale": 2.0}),
    ]
    for trial in trials:
        found = conduct.conduct(trial, tmp_path / "corpus", model_folder, FIRST_LAYER)
        assert len(found["losses"]) == 12 * 3 and found["loss"] < 0.7 * found["losses"][0]
        assert found["perplexity_before"] != found["perplexity_after"] and found["device_bytes"] > 0
        line = tables.row(Entry("methods", trial.method, Result(trial, found)))
        assert set(line) <= set(tables.COLUMNS)
        if trial.method == "meft":
            assert set(line) == set(tables.COLUMNS)
            assert 0 < found["touched_by_epoch"][-1] < 1 and 0 < found["same_fact"] <= 1.0 + 1e-6
            assert found["text_kept_by_cap"]["0.3"] <= 1 + 1e-9
    conduct._perplexity_before.cache_clear()


class Inventing(Runner):
    """Finds what a formula says, so that a whole plan takes no time."""

    def _conduct(self, trials: list[Trial], title: str) -> None:
        for trial in trials:
            best = {"meft": 2.5e-3, "lora": 8e-3 if trial.rank == 16 else 3e-3, "dense": 1e-3}[trial.method]
            if trial.method == "meft":
                MeftConfig.from_block(trial.block)  # an engine would be refused, hours later
            off = abs(math.log(trial.learning_rate / best))
            found = {
                **{
                    "losses": [2.0, 1.0 + off],
                    "loss": 1.0 + off,
                    "trained_loss": 0.5 + off,
                    "second_wording_loss": 1.0,
                },
                **{"seconds": 2.0, "seconds_per_step": 1.0, "device_bytes": 10**8, "wall_seconds": 1.0},
                **{"trained_exact_match": 0.9 - off / 9, "second_wording_exact_match": 0.6 - trial.seed / 100},
                **{"perplexity_before": 26.0, "perplexity_after": 30.0 if trial.method == "meft" else 90.0},
            }
            if trial.method == "meft":
                over = {"touched": 0.2, "touched_window": 0.3, "kept_by_cap": {str(cap): 0.99 for cap in sparsity.CAPS}}
                found |= {f"{when}_{name}": value for when in ("text", "start_text") for name, value in over.items()}
                found |= {"text_shared": 0.4, "start_text_shared": 0.3, "same_fact": 0.8, "other_fact": 0.5}
                found |= {f"{name}_by_epoch": [0.5, 0.1] for name in ("touched", "kept_mass", "dead_experts")}
            self._keep(trial, found)


def test_the_quick_run_asks_for_what_an_engine_accepts(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "Runner", Inventing)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--quick", "--model", model_folder, "--work", str(tmp_path)])
    monkeypatch.setattr(quality, "FIRST_LAYER", FIRST_LAYER)
    assert quality.main() == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["figures"] == {}


@pytest.mark.parametrize("arguments", [[], ["--full"]])
def test_the_whole_benchmark_ends_in_files_a_page_and_one_line(arguments, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "Runner", Inventing)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--model", model_folder, "--work", str(tmp_path), *arguments])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--out", str(tmp_path / "results")])
    monkeypatch.setattr(quality, "FIRST_LAYER", FIRST_LAYER)
    assert quality.main() == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["meft"]["learning_rate"] == 2.5e-3 and last["lora_16"]["learning_rate"] == 8e-3
    assert last["meft"]["second_wording"] == pytest.approx(0.59) and last["meft"]["second_wording_spread"] == 0.01
    assert last["lora_equal_bytes"]["rank"] > 16
    figures = last["figures"]
    assert figures["perplexity_rise_over_lora"] == pytest.approx(4 / 64) and figures["text_touched"] == 0.2
    assert figures["kept_mass"] == 0.1
    # The two of the second wording first, as the page explains the later by the earlier.
    second = ["second_wording_over_lora_16", "second_wording_over_equal_bytes_1500"][: 1 + bool(arguments)]
    assert list(figures) == [*second, "text_touched", "kept_mass", "below_top_k_64", "perplexity_rise_over_lora"]
    # All learn the second wording equally well here, which falls short of a lead.
    assert last["missed"] == [*second[1:], "kept_mass"]

    monkeypatch.setattr(quality_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quality_page, "ROOT", tmp_path)
    monkeypatch.setattr(quality_page, "PAGE", tmp_path / "page.md")
    quality_page.main()
    page = (tmp_path / "page.md").read_text()
    assert "| MEFT, 8192 rows | 0.0025 | 0.900 ± 0.000 | 0.590 ± 0.010 |" in page and "$" not in page
    assert "(`text_touched`) | 0.200 | ≤ 0.3 | reached |" in page
    assert "(`kept_mass`) | 0.100 | ≥ 0.98 | **missed** |" in page
    assert ("## 1,500 facts" in page) == ("| gate = none |" in page) == bool(arguments)
    for picture in re.findall(r"results/(\S+\.png)", page):
        assert (tmp_path / "results" / picture).is_file()
