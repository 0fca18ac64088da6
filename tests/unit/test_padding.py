"""Padding activates nothing, in training and in generation; masks that do not say where it is are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from meft_engine.adapter.attach import AttachedAdapters, attach
from meft_engine.adapter.calls import Call, CallTracker
from tests.families import ODD_WIDTH, fill_values, tiny_config, tiny_llama, token_ids

LENGTHS = (5, 9, 1)


def adapted(**overrides) -> tuple[LlamaForCausalLM, AttachedAdapters]:
    model = tiny_llama(**overrides)
    attached = attach(model, tiny_config(), compute_dtype=torch.float32)
    model.requires_grad_(False)
    fill_values(attached)
    return model, attached


def padded(sequences: list[Tensor], side: str, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask [batch, longest]."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


def sequences() -> list[Tensor]:
    return [token_ids(1, length, seed=length)[0] for length in LENGTHS]


def touched(attached: AttachedAdapters) -> list[set[int]]:
    """The rows of each table that have received a gradient since the last look."""
    rows = [set(table.gradient().rows.tolist()) for table in attached.tables()]
    for table in attached.tables():
        table.clear_gradient()
    return rows


@pytest.mark.parametrize("overrides", [{}, ODD_WIDTH], ids=["even", "odd"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_sequences(side, overrides):
    """Logits and gradients of the real tokens, and the active rows, are those of each sequence on its own."""
    model, attached = adapted(**overrides)
    alone, rows, sums = [], [set() for _ in attached.tables()], [torch.zeros_like(t.master) for t in attached.tables()]
    for sequence in sequences():
        logits = model(sequence[None]).logits
        logits.square().sum().backward()
        for table, total in zip(attached.tables(), sums, strict=True):
            total.index_add_(0, table.gradient().rows, table.gradient().grad)
        for union, more in zip(rows, touched(attached), strict=True):
            union |= more
        alone.append(logits[0].detach())
    for adapter in attached.adapters.values():
        adapter.stats.micro_batches = adapter.stats.active_rows = 0

    ids, mask = padded(sequences(), side)
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits.detach(), torch.cat(alone), rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    for table, total in zip(attached.tables(), sums, strict=True):
        scale = float(total.abs().max())
        assert scale > 0
        torch.testing.assert_close(table.gradient().grad, total[table.gradient().rows], rtol=1e-4, atol=1e-5 * scale)
    assert touched(attached) == rows
    assert [a.stats.active_rows for a in attached.adapters.values()] == [len(r) for r in rows[::2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_adapter_is_silent_at_padded_positions_whatever_stands_there(side):
    model, attached = adapted()
    outputs, results = {}, []
    for name, adapter in attached.adapters.items():
        adapter.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output.detach()}))
    for filler in (0, 50):
        ids, mask = padded(sequences(), side, filler)
        logits = model(ids, attention_mask=mask).logits
        logits[mask.bool()].sum().backward()
        results.append((logits[mask.bool()].detach(), touched(attached)))
        for output in outputs.values():
            assert output.shape == (*ids.shape, 32)
            assert not output[mask == 0].any() and output[mask == 1].any()
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_padding_is_looked_for_once_a_forward(monkeypatch):
    """A device that computes must be waited for to know how many tokens are real."""
    model, attached = adapted()
    ids, mask = padded(sequences(), "left")
    looked, find = [], CallTracker._find_real
    monkeypatch.setattr(CallTracker, "_find_real", staticmethod(lambda *args: looked.append(args) or find(*args)))
    for forwards in (1, 2):
        model(ids, attention_mask=mask)
        assert len(looked) == forwards < len(attached.adapters)


def test_hidden_states_of_several_lengths_in_one_forward():
    """Each has its own last columns of the mask, whichever was asked about first."""
    tracker = CallTracker(nn.Module())
    tracker._running.append(Call(mask=torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])))
    for _ in range(2):
        assert tracker.real_tokens(torch.Size((2, 4, 8))).tolist() == [1, 3, 4, 5, 6]
        assert tracker.real_tokens(torch.Size((2, 2, 8))).tolist() == [1, 2]


def test_a_batch_of_nothing_but_padding():
    model, attached = adapted()
    model(token_ids(2, 5), attention_mask=torch.zeros(2, 5)).logits.sum().backward()
    assert all(table.gradient() is None for table in attached.tables())
    assert [a.stats.active_rows for a in attached.adapters.values()] == [0, 0, 0]


def test_a_mask_of_ones_is_no_mask():
    model, _ = adapted()
    ids = token_ids(2, 5)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


def test_the_last_columns_of_a_longer_mask_count():
    """As in a step of generation: the mask covers the cache and the new token."""
    model, attached = adapted()
    ids, mask = padded(sequences(), "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :-2], attention_mask=mask[:, :-2])
        second = model(ids[:, -2:], attention_mask=mask, past_key_values=first.past_key_values).logits
    real = mask[:, -2:].bool()
    assert real.any() and not real.all()
    torch.testing.assert_close(second[real], whole[:, -2:][real], rtol=1e-4, atol=1e-4)


def greedy_by_full_recomputation(model: LlamaForCausalLM, prompt: Tensor, steps: int) -> list[int]:
    ids = prompt.clone()
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, model(ids[None], use_cache=False).logits[0, -1].argmax()[None]))
    return ids[len(prompt) :].tolist()


def test_generation_with_left_padding_and_a_cache_is_token_by_token():
    model, attached = adapted()
    model.eval()
    ids, mask = padded(sequences(), "left")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    assert generated == [greedy_by_full_recomputation(model, prompt, 9) for prompt in sequences()]
    # Evaluation is not counted as training.
    assert all(adapter.stats.micro_batches == 0 for adapter in attached.adapters.values())
    base = tiny_llama().eval().generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    assert generated != base


MASKS = {
    "4-dimensional": (torch.ones(2, 1, 5, 5, dtype=torch.bool), "is a 4-dimensional tensor"),
    "1-dimensional": (torch.ones(5), "is a 1-dimensional tensor"),
    "a dictionary": ({"full_attention": torch.ones(2, 5)}, "is a dict"),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("positional", [False, True])
def test_masks_that_hide_padding_are_refused(kind, positional):
    """The next call works as if nothing had happened."""
    model, _ = adapted()
    ids = token_ids(2, 5)
    logits = model(ids).logits
    mask, words = MASKS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"attention_mask {words}, .*; pass a \[batch, seq\] mask"):
            model.model(ids, mask) if positional else model(ids, attention_mask=mask)
        assert torch.equal(model(ids).logits, logits)


def test_generation_with_a_static_cache_is_refused():
    model, _ = adapted()
    ids, mask = padded(sequences(), "left")
    with pytest.raises(ValueError, match="use the default dynamic cache"):
        model.eval().generate(
            ids, attention_mask=mask, max_new_tokens=3, cache_implementation="static", disable_compile=True
        )


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (3, 5)])
def test_a_mask_of_the_wrong_size_raises(shape):
    """Of the stack alone, since attention itself may object first."""
    model, attached = adapted()
    adapter = attached.adapters["model.layers.1.mlp"]
    model.model.forward = lambda inputs_embeds, attention_mask: adapter(inputs_embeds)
    hidden = torch.randn(2, 5, 32)
    expected = rf"attention_mask of shape \({shape[0]}, {shape[1]}\) does not cover hidden states of shape \(2, 5, 32\)"
    with pytest.raises(ValueError, match=expected):
        model.model(inputs_embeds=hidden, attention_mask=torch.ones(shape))
    assert model.model(inputs_embeds=hidden, attention_mask=torch.ones(2, 5)).shape == (2, 5, 32)
