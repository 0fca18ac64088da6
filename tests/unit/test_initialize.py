"""Where keys and router start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meft_engine.adapter.attach import attach
from meft_engine.adapter.initialize import initial_keys, initial_router
from tests.families import tiny_config, tiny_llama

ODD_ROWS, ODD_WIDTH = 43, 29


def gate_weight(rows: int = ODD_ROWS, width: int = ODD_WIDTH, seed: int = 1) -> Tensor:
    """Rows of very different sizes, so that noise in proportion to a row can be told from noise that is not."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.linspace(-2, 1, rows)[:, None]
    return sizes * torch.randn(rows, width, generator=generator)


def distinct_rows(keys: Tensor) -> int:
    return len({tuple(row) for row in (keys + 0.0).tolist()})


@pytest.mark.parametrize("method", ["ffn", "random"])
def test_keys_depend_on_the_seed_alone(method):
    """The global generator neither matters nor moves."""
    weight = gate_weight()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = initial_keys(weight, 101, method, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(initial_keys(weight, 101, method, seed=5), first)
    assert not torch.equal(initial_keys(weight, 101, method, seed=6), first)


def test_random_keys_are_as_large_as_the_others_and_know_nothing_of_the_ffn():
    weight, repetitions = gate_weight(), 40
    random, ffn = (initial_keys(weight, repetitions * ODD_ROWS, method, seed=5) for method in ("random", "ffn"))
    assert random.shape == ffn.shape and random.dtype == torch.float32 and distinct_rows(random) == len(random)
    assert float(random.square().mean()) == pytest.approx(float(ffn.square().mean()), rel=0.05)
    assert float(random.square().mean()) == pytest.approx(5 * float(weight.square().mean()), rel=0.03)
    assert abs(float(random.mean() / random.std())) < 0.02
    # Every row has the same size: none follows a row of the FFN.
    assert float(random.norm(dim=1).max() / random.norm(dim=1).min()) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ffn_keys_are_the_gate_rows_and_twice_as_much_noise(dtype):
    """Measured by each row's own root mean square; noise is independent of the rows, and averages out."""
    weight, repetitions = gate_weight().to(dtype), 400
    keys = initial_keys(weight, repetitions * ODD_ROWS, "ffn", seed=5)
    assert keys.dtype == torch.float32 and distinct_rows(keys) == len(keys)
    size = weight.float().square().mean(1, keepdim=True).sqrt()
    noise = (keys.view(repetitions, ODD_ROWS, ODD_WIDTH) - weight.float()) / size
    assert float(noise.square().mean().sqrt()) == pytest.approx(2, rel=0.01)
    assert noise.square().mean((0, 2)).sqrt().sub(2).abs().max() < 0.1  # for each row of the FFN
    assert noise.mean(0).abs().max() < 6 * 2 / repetitions**0.5


def test_a_zero_row_gets_noise_as_large_as_the_matrix():
    weight = gate_weight()
    weight[[3, 17]] = 0.0
    keys = initial_keys(weight, 2 * ODD_ROWS, "ffn", seed=5)
    assert distinct_rows(keys) == 2 * ODD_ROWS
    size = keys[[3, 17, 3 + ODD_ROWS, 17 + ODD_ROWS]].square().mean(1).sqrt() / weight.square().mean().sqrt()
    assert size.tolist() == pytest.approx([2] * 4, rel=0.4)


@pytest.mark.parametrize("method", ["ffn", "random"])
def test_no_two_keys_are_equal_over_a_base_of_zeros(method):
    assert distinct_rows(initial_keys(torch.zeros(5, ODD_WIDTH), 13, method, seed=5)) == 13


@pytest.mark.parametrize("num_experts", [1, 7, 91])
def test_router_is_the_mean_key_of_each_expert(num_experts):
    keys = initial_keys(gate_weight(), 91, "ffn", seed=5)
    size = 91 // num_experts
    expected = torch.tensor(
        [
            [sum(keys[e * size + i, c].item() for i in range(size)) / size for c in range(ODD_WIDTH)]
            for e in range(num_experts)
        ]
    )
    torch.testing.assert_close(initial_router(keys, num_experts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ffn", "random"])
def test_layers_of_a_model_start_differently_and_reproducibly(method):
    """Same seed: the same adapter, whatever was drawn before. Another seed, another layer: other keys."""

    def adapters(seed: int) -> list:
        return list(
            attach(
                tiny_llama(),
                tiny_config({"rows": 105, "init_keys": method, "seed": seed}),
                compute_dtype=torch.float32,
            ).adapters.values()
        )

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapters(seed=42)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for one, again, other in zip(first, adapters(seed=42), adapters(seed=43), strict=True):
        assert torch.equal(one.keys.master, again.keys.master) and torch.equal(one.router, again.router)
        assert not torch.equal(one.keys.master, other.keys.master)
        torch.testing.assert_close(one.router.detach(), one.keys.master.view(5, 21, -1).mean(1))
        assert not one.values.master.any()
    for one, following in zip(first, first[1:], strict=False):
        # The noise too must differ between layers, not only the rows that it is added to.
        if method == "ffn":
            noises = [a.keys.master[48:96] - a.keys.master[:48] for a in (one, following)]
            noises = [noise / noise.norm() for noise in noises]
            assert abs(float((noises[0] * noises[1]).sum())) < 0.1
        assert not torch.equal(one.keys.master, following.keys.master)
