"""What autograd keeps of a forward, by its own account, with linear layers of PyTorch or of DeepSpeed's stage 3."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


def use_linear_layers(stage_3: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has prepared stage 3, or in one that has not; DeepSpeed replaces them for good."""
    monkeypatch.setattr(functional, "linear", zero3_linear_wrap if stage_3 else torch._C._nn.linear)


def kept_by_autograd(
    model: PreTrainedModel, ids: Tensor, stage_3: bool, monkeypatch: pytest.MonkeyPatch
) -> dict[int, int]:
    """Bytes by storage that the forward of a frozen model leaves for the backward, and its logits and loss."""
    use_linear_layers(stage_3, monkeypatch)
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # tensors, since the memory of one that is gone may become another's

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    for tensor in (out.logits, out.loss):
        keep(tensor)
    return {place: tensor.untyped_storage().nbytes() for place, tensor in kept.items()}
