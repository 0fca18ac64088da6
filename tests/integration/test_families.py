"""What an adapter does, for every family of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from meft_engine import disable_adapter, load_adapter, set_adapter, unload_adapter
from meft_engine.adapter.attach import AttachedAdapters, attach
from meft_engine.checkpoint.export import save_adapter
from meft_engine.config import MeftConfigError
from meft_kernels import reference
from tests.families import FAMILIES, VOCAB, Family, fill_values, keys_from, tiny_config
from tests.integration.engines import build_engine, masters

# Few in `make test`, all in `make test-families`: one of each way to build an FFN.
_IN_EVERY_RUN = {"Phi-3", "GPT-2", "OPT", "Qwen2-MoE", "T5"}


@pytest.fixture(params=[pytest.param(n, marks=() if n in _IN_EVERY_RUN else pytest.mark.families) for n in FAMILIES])
def family(request) -> Family:
    return FAMILIES[request.param]


def batch(family: Family, pad: int = 0) -> dict[str, Tensor]:
    """Three sequences, the last two with ``pad`` tokens of padding on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1:, :pad], mask[1:, :pad] = 0, 0
    labels = {"labels": torch.randint(3, VOCAB, (3, 5), generator=generator)} if family.encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **labels}


def logits_of(model: nn.Module, family: Family, pad: int = 0) -> Tensor:
    return model(**batch(family, pad), use_cache=False).logits


def adapted(family: Family, dtype: torch.dtype = torch.float32, **adapter) -> tuple[nn.Module, AttachedAdapters]:
    """With values that matter."""
    model = family.model().to(dtype)
    attached = attach(model, tiny_config(adapter), compute_dtype=dtype)
    fill_values(attached)
    return model, attached


@pytest.mark.behaviour("step 0 is the base")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attaching_changes_nothing_but_what_it_adds(family, dtype):
    model = family.model().to(dtype)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, logits_of(model, family)
    attached = attach(model, tiny_config({"init_keys": "ffn"}), compute_dtype=dtype)
    assert torch.equal(logits_of(model, family), logits)
    after = model.state_dict()
    assert all(torch.equal(after.pop(name), tensor) for name, tensor in before.items())
    assert sorted(after) == sorted(f"{name}.meft_adapter.router" for name in attached.adapters)
    assert len(attached.adapters) == len(family.ffns)
    assert all(adapter.stats.active_rows > 0 for adapter in attached.adapters.values())
    fill_values(attached)
    assert not torch.equal(logits_of(model, family), logits)


# Where the weights are that an FFN's input meets first, in layer 0, as [f, 32].
FIRST = {
    "Phi-3": lambda m: m.model.layers[0].mlp.gate_up_proj.weight[:48],
    "GPT-2": lambda m: m.transformer.h[0].mlp.c_fc.weight.T,
    "GPT-NeoX": lambda m: m.gpt_neox.layers[0].mlp.dense_h_to_4h.weight,
    "OPT": lambda m: m.model.decoder.layers[0].fc1.weight,
    "Falcon": lambda m: m.transformer.h[0].mlp.dense_h_to_4h.weight,
    "Bloom": lambda m: m.transformer.h[0].mlp.dense_h_to_4h.weight,
    "Mixtral": lambda m: torch.cat([e[:48] for e in m.model.layers[0].mlp.experts.gate_up_proj]),
    "Qwen2-MoE": lambda m: torch.cat([e[:24] for e in m.model.layers[0].mlp.experts.gate_up_proj]),
    "Qwen3-MoE": lambda m: torch.cat([e[:24] for e in m.model.layers[0].mlp.experts.gate_up_proj]),
    "T5": lambda m: m.encoder.block[0].layer[1].DenseReluDense.wi.weight,
    "T5, gated": lambda m: m.encoder.block[0].layer[1].DenseReluDense.wi_0.weight,
}


@pytest.mark.behaviour("keys from the FFN")
def test_keys_start_as_the_rows_that_the_input_meets_first(family):
    model = family.model()
    name = next(name for name, value in FAMILIES.items() if value is family)
    expected = FIRST.get(name, lambda m: m.model.layers[0].mlp.gate_proj.weight)(model).detach().clone()
    config = tiny_config({"init_keys": "ffn", "rows": 2 * len(expected), "num_experts": 2})
    adapter = next(iter(attach(model, config, compute_dtype=torch.float32).adapters.values()))
    assert torch.equal(adapter.keys.master, keys_from(expected, config))


@pytest.mark.behaviour("output as defined, padding")
@pytest.mark.parametrize("pad", [0, 2])
def test_the_output_is_the_definition_beside_every_ffn(family, pad):
    """Against the base model with the reference added between the modules that the list of families names."""
    model, attached = adapted(family)
    plain, config = family.model(), tiny_config().adapter
    inputs: dict[int, Tensor] = {}
    masks = [None if not pad else batch(family, pad)["attention_mask"]] * len(family.ffns)
    if family.encoder_decoder:
        masks[len(masks) // 2 :] = [None] * (len(masks) // 2)

    def add(index: int, adapter, output: Tensor) -> Tensor:
        h = inputs[index].reshape(-1, 32)
        real = torch.ones(len(h), dtype=torch.bool) if masks[index] is None else masks[index].flatten().bool()
        contribution, _ = reference.adapter(
            h[real].double(),
            adapter.keys.master.double(),
            adapter.values.master.double(),
            adapter.router.double(),
            experts_per_token=config.experts_per_token,
            top_k=config.top_k,
            gate=config.gate,
        )
        y = torch.zeros_like(h).index_copy(0, real.nonzero().flatten(), contribution.float())
        return output + y.view_as(output)

    for index, ((first, last), adapter) in enumerate(zip(family.ffns, attached.adapters.values(), strict=True)):
        plain.get_submodule(first).register_forward_pre_hook(
            lambda m, args, kwargs, i=index: inputs.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        plain.get_submodule(last).register_forward_hook(lambda m, args, output, i=index, a=adapter: add(i, a, output))
    found, expected = logits_of(model, family, pad), logits_of(plain, family, pad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def gradients(model: nn.Module, attached: AttachedAdapters, family: Family) -> list[Tensor]:
    logits_of(model, family, 2).square().mean().backward()
    found = []
    for adapter in attached.adapters.values():
        found.append(adapter.router.grad)
        adapter.router.grad = None
    for table in attached.tables():
        gradient = table.gradient()
        dense = torch.zeros(table.rows, table.width).index_copy(0, gradient.rows, gradient.grad)
        found.append(dense)
        table.clear_gradient()
    return found


def frozen(family: Family) -> tuple[nn.Module, AttachedAdapters]:
    model, attached = adapted(family)
    model.requires_grad_(False)
    for adapter in attached.adapters.values():
        adapter.router.requires_grad_()
    return model, attached


@pytest.mark.behaviour("gradients")
def test_keys_values_and_routers_of_every_layer_get_gradients_and_nothing_else_does(family):
    model, attached = frozen(family)
    assert all(float(g.abs().max()) > 0 for g in gradients(model, attached, family))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.behaviour("activation checkpointing")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(family, reentrant):
    expected = gradients(*frozen(family), family)
    model, attached = frozen(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for found, wanted in zip(gradients(model, attached, family), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.behaviour("trains in the engine")
@pytest.mark.parametrize("stage", [0, 2])
def test_an_engine_trains_it(family, stage):
    """The loss falls, rows of every table move, and the base stays."""
    engine = build_engine(family.model(), stage=stage, adam={"lr": 3e-2})
    base = {n: p.detach().clone() for n, p in engine.module.named_parameters() if not p.requires_grad}
    inputs, before = batch(family, 2), masters(engine)
    inputs.setdefault("labels", inputs["input_ids"])
    losses = []
    for _ in range(8):
        loss = engine(**inputs, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all((rows != before[name]).any() for name, rows in masters(engine).items())
    assert base and all(torch.equal(p, base[n]) for n, p in engine.module.named_parameters() if n in base)
    engine.destroy()


@pytest.mark.behaviour("export, PEFT")
def test_what_an_engine_exports_gives_its_logits_and_its_text(family, tmp_path):
    """Under one ZeRO stage or another; to a plain model, and to one of PEFT."""
    stage = list(FAMILIES.values()).index(family) % 4
    engine = build_engine(family.model(), stage=stage, adam={"lr": 3e-2})
    fill_values(engine.meft_adapters)
    inputs = batch(family, 2)
    engine.backward(engine(**{"labels": inputs["input_ids"], **inputs}, use_cache=False).loss)
    engine.step()
    engine.eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    prompts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, text = logits_of(engine, family, 2), engine.module.generate(**prompts, **settings)
    engine.save_adapter(tmp_path)
    engine.destroy()
    loaded = load_adapter(family.model(), tmp_path).eval()
    through_peft = peft.PeftModel.from_pretrained(family.model(), tmp_path).eval()
    for model in (loaded, through_peft):
        with torch.no_grad():
            torch.testing.assert_close(logits_of(model, family, 2), expected, rtol=0, atol=1e-6)
            assert torch.equal(model.generate(**prompts, **settings), text)
    with torch.no_grad():
        assert (logits_of(family.model().eval(), family, 2) - expected).abs().max() > 1e-2


@pytest.mark.behaviour("generate, cache, left padding")
def test_greedy_generation_does_not_depend_on_the_batch_or_on_padding(family):
    """With a cache, prompts of several lengths padded on the left, against one prompt at a time without a cache."""
    model, _ = adapted(family)
    model.eval()
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (7, 4, 6, 2)]
    longest = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.int64), p]) for p in prompts])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, -6:]
    for prompt, continuation in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], use_cache=False, **settings)
        assert alone[0, -6:].tolist() == continuation.tolist()


@pytest.mark.behaviour("save and load")
def test_a_saved_adapter_gives_a_fresh_model_the_same_logits(family, tmp_path):
    model, attached = adapted(family)
    save_adapter(attached, tmp_path)
    expected = logits_of(model.eval(), family, 2)
    for rows in ("host", "device"):
        loaded = load_adapter(family.model().eval(), tmp_path, rows=rows)
        assert torch.equal(logits_of(loaded, family, 2), expected)


@pytest.mark.behaviour("two adapters, disabled")
def test_each_of_two_adapters_gives_what_it_gives_alone(family, tmp_path):
    model, base = family.model().eval(), logits_of(family.model().eval(), family, 2)
    alone = {}
    for name, gate in (("a", "softmax"), ("b", "none")):
        single, attached = adapted(family, gate=gate, layers_to_transform=[int(name == "b")])
        save_adapter(attached, tmp_path / name)
        alone[name] = logits_of(single.eval(), family, 2)
        load_adapter(model, tmp_path / name, name=name)
    for name, expected in alone.items():
        set_adapter(model, name)
        assert torch.equal(logits_of(model, family, 2), expected)
        with disable_adapter(model):
            assert torch.equal(logits_of(model, family, 2), base)


@pytest.mark.behaviour("unload")
def test_unloading_leaves_the_base_as_it_was(family):
    base = family.model()
    model, _ = adapted(family)
    assert not torch.equal(logits_of(model, family, 2), logits_of(base, family, 2))
    assert unload_adapter(model) is model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    tensors = base.state_dict()
    assert list(tensors) == list(model.state_dict())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, family, 2), logits_of(base, family, 2))
    with pytest.raises(MeftConfigError, match="has no MEFT adapters to unload"):
        unload_adapter(model)


def compiled_logits(family: Family, *, dynamic: bool) -> tuple[Tensor, Tensor, Counter[str]]:
    """Of a plain model and of the same one compiled, and how often an operator stands in the graphs; ``dynamic``:
    operators whose outputs have a size that depends on data may."""
    model, _ = adapted(family)
    model.eval()
    expected, found = logits_of(model, family, 2), Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=dynamic):
        logits = logits_of(torch.compile(model, backend=backend), family, 2)
    torch._dynamo.reset()
    return logits, expected, found


@pytest.mark.behaviour("torch.compile")
@pytest.mark.families
def test_a_model_is_compiled_with_its_adapters(family):
    """Each of them is two operators in a graph; the result is that of the plain model."""
    logits, expected, found = compiled_logits(family, dynamic=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert found["meft.route.default"] == found["meft.apply.default"] == len(family.ffns)


@pytest.mark.families
def test_a_graph_may_end_where_rows_are_chosen():
    """As it does by default."""
    logits, expected, found = compiled_logits(FAMILIES["Llama"], dynamic=False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert found["meft.apply.default"] and not found["meft.route.default"]
