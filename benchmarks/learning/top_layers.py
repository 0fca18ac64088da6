"""The trained end of a model: its last layers and its head, over what the frozen layers below gave."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from collator import IGNORED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class TopLayers(nn.Module):
    """The last layers of a causal language model with its final norm and head; frozen.

    Args:
        model: folder of a model of the Llama family. first_layer: the lowest layer that is kept.
    """

    def __init__(self, model: str, first_layer: int) -> None:
        super().__init__()
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.lm_head = whole.lm_head
        self.model = whole.model
        self.model.layers = self.model.layers[first_layer:]
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.layer_idx = index
        self.model.config.num_hidden_layers = len(self.model.layers)
        self.model.embed_tokens = nn.Identity()  # its weights are the head's
        self.requires_grad_(False)
        self.real: Tensor | None = None
        """[B, S] bool: which tokens of the present forward are no padding."""

    def states(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S, d]: what the head reads."""
        self.real = attention_mask.bool()
        return self.model(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def forward(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the learned tokens."""
        logits, targets, _ = self.predictions(hidden, attention_mask, labels)
        return F.cross_entropy(logits, targets)

    def predictions(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V] for the learned tokens, these tokens [n], and which passage of the batch each belongs to [n].

        The head is applied to the places before learned tokens alone: over the whole passage it would cost more than
        the layers.
        """
        targets = labels[:, 1:]
        learned = targets != IGNORED
        states = self.states(hidden, attention_mask)[:, :-1]
        return self.lm_head(states[learned]), targets[learned], learned.nonzero()[:, 0]
