"""The differentiable step from picks to output: rows come in from the host, their gradients go back to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.phases import phase
from meft_kernels.dispatch import Selection, token_passes

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
        passes = token_passes(x.device)
        activations = scores * passes.picked_gates(gates, selection)
        with values.rows_at(selection.active, latest=latest) as rows:
            return passes.combine_rows(activations, rows, selection)

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
        active = selection.active
        with (
            values.rows_at(active, values_version, latest=ctx.latest) as value_rows,
            keys.rows_at(active, keys_version, latest=ctx.latest) as key_rows,
        ):
            passes, room = token_passes(x.device), values.room_for_gradients
            found = passes.gradients(grad_y, x, scores, gates, value_rows, key_rows, selection, room)
        of_values, of_keys = found.squared_norms or (None, None)
        values.accumulate(active, found.values, of_values)
        keys.accumulate(active, found.keys, of_keys)
        return found.x, found.gates, None, None, None, None, None, *(torch.zeros_like(a) for a in anchors)
