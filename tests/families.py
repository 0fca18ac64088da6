"""The tiny models that every behaviour is run over, and the small helpers that go with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.config import MeftConfig

VOCAB = 97

ODD_WIDTH = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
"""Overrides for a width that no vector unit divides."""


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama of three layers, in fp32 and in training mode; the global generator stays as it is.

    Weights are drawn wider than usual, so that the layers matter next to the residual stream.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def tiny_block(adapter: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A ``"meft"`` block that fits the tiny models: 35 rows in 5 experts; both arguments override."""
    shape = {"rows": 35, "num_experts": 5, "experts_per_token": 2, "top_k": 3, "init_keys": "random"}
    return {"enabled": True, "adapter": {**shape, **(adapter or {})}, **sections}


def tiny_config(adapter: dict[str, Any] | None = None, **sections: Any) -> MeftConfig:
    """:func:`tiny_block`, validated."""
    return MeftConfig.from_block(tiny_block(adapter, **sections))


def fill_values(attached: AttachedAdapters, seed: int = 7, scale: float = 0.3) -> None:
    """Replace the zeros that values start from, so that the adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in attached.adapters.values():
        adapter.values.fill(scale * torch.randn(adapter.values.rows, adapter.values.width, generator=generator))


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length] token ids, none of which is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
