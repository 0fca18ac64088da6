"""The differentiable step from picks to output: rows come in from the host, their gradients go back to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.phases import phase
from meft_kernels.dispatch import TokensOfRow, combine_rows, score_picks
from meft_kernels.sparse import Selection

_SELECTION_TENSORS = len(fields(Selection))


class ApplyRows(torch.autograd.Function):
    """``y_t = Σ_j z_tj B_j`` over the picks j of token t, where ``z_tj = gate · (x_t · A_j)``.

    Inputs: x [T, d] float32; gates [T, n] float32; scores [T, K] float32, the raw ``x · A_j`` of the picks (its
    gradient flows into x here); the selection; the two tables; whether to insist on their
    latest rows; anchors, which receive zeros: an input that requires
    grad is what makes autograd come here where neither x nor the gates do.

    Gradients of rows are not returned but handed to the tables, since autograd would want them dense.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        scores: Tensor,
        selection: Selection,
        keys: PartiallyOffloadedTensor,
        values: PartiallyOffloadedTensor,
        latest: bool,
        *anchors: Tensor,
    ) -> Tensor:
        # The selection too is saved, not merely kept: it shall die with the backward, not with the output.
        ctx.save_for_backward(x, gates, scores, *vars(selection).values(), *anchors)
        ctx.keys, ctx.values, ctx.latest = keys, values, latest
        ctx.versions = keys.version, values.version
        activations = scores * _picked(gates, selection)
        return combine_rows(activations, values.gather(selection.active, latest=latest), selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with phase("row_gradients"):
            return ApplyRows._gradients(ctx, grad_y)

    @staticmethod
    def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, scores, *rest = ctx.saved_tensors
        selection, anchors = Selection(*rest[:_SELECTION_TENSORS]), rest[_SELECTION_TENSORS:]
        keys, values = ctx.keys, ctx.values
        keys_version, values_version = ctx.versions
        picked_gates = _picked(gates, selection)
        tokens_of_row = TokensOfRow(selection)

        grad_z = score_picks(grad_y, values.gather(selection.active, values_version, latest=ctx.latest), selection)
        values.accumulate(selection.active, tokens_of_row.combine(scores * picked_gates, grad_y))

        grad_scores = grad_z * picked_gates
        grad_x = combine_rows(grad_scores, keys.gather(selection.active, keys_version, latest=ctx.latest), selection)
        keys.accumulate(selection.active, tokens_of_row.combine(grad_scores, x))

        grad_gates = torch.zeros_like(gates).scatter_add_(1, selection.slots, grad_z * scores)
        return grad_x, grad_gates, None, None, None, None, None, *(torch.zeros_like(a) for a in anchors)


def _picked(gates: Tensor, selection: Selection) -> Tensor:
    """[T, K]: the gate of each pick's expert; 0 where there is no pick, since a NaN gate times 0 would be NaN."""
    return torch.where(selection.valid, gates.gather(1, selection.slots), 0)
