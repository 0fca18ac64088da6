"""Prints the bytes that autograd keeps of a frozen Llama's forward, and those of its weights.

A program of its own, since what a process has done before may change which attention it takes.
"""

from __future__ import annotations

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 1000}
TOKENS = (2, 96)


def main() -> None:
    """In bf16, without checkpointing."""
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **SHAPE)).bfloat16()
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(SHAPE["vocab_size"], TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    base = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"kept": sum(kept.values()), "base": base}))


if __name__ == "__main__":
    main()
