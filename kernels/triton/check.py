"""Whether the kernels work where they are to run: a compiler that is missing shows there, and so does one that errs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from meft_kernels import sparse
from meft_kernels.sparse import PickGradients, RowsAt
from meft_kernels.triton import passes

_TOKENS, _WIDTH, _EXPERTS, _EXPERT_ROWS = 20, 48, 6, 16


def fault(device: torch.device) -> str | None:
    """What is wrong with the kernels on a device, or ``None``: a small layer is computed by them and by PyTorch.

    Inputs are small integers, of which every sum is exact whatever the arithmetic, so that selections must be equal.
    """
    try:
        found = _layer(passes, device)
    except Exception as error:  # Triton, its compiler and the driver each raise their own.
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    expected = _layer(sparse, device)
    for name, ours in found.items():
        theirs = expected[name]
        if ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-3):
            return f"{name} differs from what PyTorch finds"
    return None


def _layer(module: ModuleType, device: torch.device) -> dict[str, Tensor]:
    """Forward and backward of an adapter by a module's passes."""
    generator = torch.Generator().manual_seed(0)
    # The interpreter's arithmetic in bf16 is wrong.
    narrow = torch.bfloat16 if device.type != "cpu" else torch.float32

    def integers(rows: int) -> Tensor:
        return torch.randint(-3, 4, (rows, _WIDTH), generator=generator).to(device, narrow)

    h, grad_y, router = integers(_TOKENS), integers(_TOKENS), integers(_EXPERTS)
    keys, values = integers(_EXPERTS * _EXPERT_ROWS), integers(_EXPERTS * _EXPERT_ROWS)
    given = module.inputs(h, None)
    chosen = module.choose_experts(given, router, 2, "none", None)
    selection, scores, _ = module.choose_rows(given, keys, chosen, top_k=6, cap=30)
    rows = [RowsAt(table, selection.active) for table in (values, keys)]
    y = module.combine_rows(scores * module.picked_gates(chosen.gates, selection), rows[0], selection)
    back = module.gradients(grad_y, given, scores, chosen.gates, *rows, selection)
    found = int(selection.number)
    back = back._replace(values=back.values[:found], keys=back.keys[:found])
    gradients = zip(PickGradients._fields[:4], back[:4], strict=True)
    return {
        "the choice of experts": chosen.experts,
        "the choice of rows": selection.active[:found],
        "the output": y,
        **{f"the gradient of {name}": gradient for name, gradient in gradients},
    }
