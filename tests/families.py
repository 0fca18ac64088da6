"""The tiny models that every behaviour is run over, and the small helpers that go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meft_engine.adapter.attach import AttachedAdapters
from meft_engine.adapter.initialize import initial_keys, seed_of_layer
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
    """A ``"meft"`` block that fits the tiny models: 35 rows in 5 experts; both arguments override.

    Inputs are not centered, no loss is added and all rows have one learning rate, so that dense models need not know of
    any of it; ``test_centered_inputs.py``, ``test_routing_health.py`` and ``test_dense_parity.py`` are about that.
    """
    shape = {"rows": 35, "num_experts": 5, "experts_per_token": 2, "top_k": 3, "init_keys": "random"}
    shape["center_inputs"] = False
    sections["router"] = {"balance": "none", **sections.get("router", {})}
    sections["optimizer"] = {"value_lr_scale": 1.0, **sections.get("optimizer", {})}
    return {"enabled": True, "adapter": {**shape, **(adapter or {})}, **sections}


def tiny_config(adapter: dict[str, Any] | None = None, **sections: Any) -> MeftConfig:
    """:func:`tiny_block`, validated."""
    return MeftConfig.from_block(tiny_block(adapter, **sections))


def keys_from(gate_weight: Tensor, config: MeftConfig, layer: int = 0) -> Tensor:
    """[r, d]: the keys that a layer has to start from, if these [f, d] are its FFN's rows."""
    adapter = config.adapter
    return initial_keys(gate_weight, adapter.rows, adapter.init_keys, seed_of_layer(adapter.seed, layer))


def fill_values(attached: AttachedAdapters, seed: int = 7, scale: float = 0.3) -> None:
    """Replace the zeros that values start from, so that the adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in attached.adapters.values():
        adapter.values.fill(scale * torch.randn(adapter.values.rows, adapter.values.width, generator=generator))


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length] token ids, none of which is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@dataclass(frozen=True)
class Family:
    """A tiny model of two layers with random weights, and where its FFNs begin and end."""

    build: Callable[[], nn.Module]
    ffns: tuple[tuple[str, str], ...]
    """For every FFN, in the order of the model, the module that gets its input and the one that gives its output."""
    encoder_decoder: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """In fp32 and in training mode, without dropout; the global generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            # Most families draw so narrowly that layers hardly matter next to the residual stream.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.15)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()


_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS}
_GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, **_SHAPE}


def _each(pattern: str, *last: str) -> tuple[tuple[str, str], ...]:
    """FFNs of both layers; ``last``: the name of the end, where it is not the beginning."""
    names = [pattern.format(layer) for layer in range(2)]
    return tuple((name, last[0].format(layer) if last else name) for layer, name in enumerate(names))


def _causal(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """``LlamaForCausalLM(LlamaConfig(…))`` for ``Llama``."""
    config = getattr(hf, f"{kind}TextConfig", None) or getattr(hf, f"{kind}Config")
    head = getattr(hf, f"{kind}ForCausalLM", None) or getattr(hf, f"{kind}LMHeadModel")
    return lambda: head(config(**settings))


def _t5(**settings: Any) -> Callable[[], nn.Module]:
    shape = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {**_TOKENS, "decoder_start_token_id": 0}
    return lambda: hf.T5ForConditionalGeneration(hf.T5Config(**shape, **tokens, **settings))


_T5_FFNS = (*_each("encoder.block.{}.layer.1.DenseReluDense"), *_each("decoder.block.{}.layer.2.DenseReluDense"))
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_TOKENS}
_MLP = _each("model.layers.{}.mlp")
_H_MLP = _each("transformer.h.{}.mlp")

FAMILIES = {
    "Llama": Family(_causal("Llama", **_GATED), _MLP),
    "Llama, tied": Family(_causal("Llama", tie_word_embeddings=True, **_GATED), _MLP),
    "Mistral": Family(_causal("Mistral", head_dim=8, sliding_window=16, **_GATED), _MLP),
    "Qwen2": Family(_causal("Qwen2", **_GATED), _MLP),
    "Qwen3": Family(_causal("Qwen3", head_dim=8, **_GATED), _MLP),
    "Gemma 2": Family(_causal("Gemma2", head_dim=8, sliding_window=16, **_GATED), _MLP),
    "Gemma 3": Family(_causal("Gemma3", head_dim=8, sliding_window=16, **_GATED), _MLP),
    "OLMo 2": Family(_causal("Olmo2", **_GATED), _MLP),
    "Phi-3": Family(_causal("Phi3", **_GATED), _MLP),
    "GPT-2": Family(_causal("GPT2", resid_pdrop=0.0, **_GPT2), _H_MLP),
    "GPT-NeoX": Family(
        _causal("GPTNeoX", intermediate_size=48, max_position_embeddings=64, **_SHAPE, **_NO_DROPOUT),
        _each("gpt_neox.layers.{}.mlp"),
    ),
    "OPT": Family(
        _causal("OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **_SHAPE),
        _each("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    ),
    "Falcon": Family(_causal("Falcon", **_SHAPE, **_NO_DROPOUT), _H_MLP),
    "Bloom": Family(_causal("Bloom", hidden_size=32, n_layer=2, n_head=4, **_TOKENS, **_NO_DROPOUT), _H_MLP),
    "Mixtral": Family(_causal("Mixtral", num_local_experts=4, num_experts_per_tok=2, **_GATED), _MLP),
    "Qwen2-MoE": Family(_causal("Qwen2Moe", **_MOE, shared_expert_intermediate_size=40, **_GATED), _MLP),
    "Qwen3-MoE": Family(_causal("Qwen3Moe", **_MOE, head_dim=8, **_GATED), _MLP),
    "T5": Family(_t5(), _T5_FFNS, encoder_decoder=True),
    "T5, gated": Family(_t5(feed_forward_proj="gated-gelu"), _T5_FFNS, encoder_decoder=True),
}
"""The families that every behaviour is run over, by their names for people."""
