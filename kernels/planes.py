"""An fp32 as two exact planes of 16 bits: its bf16, which the model computes with, and the rest.

``high = (bits + 0x8000) >> 16`` is the bf16 to nearest, ties away from zero (torch rounds ties to even, and agrees
otherwise); ``low = bits - (high << 16)`` fits a signed 16-bit integer. Together they are the fp32, bit for bit, but for
NaN, whose payload may be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The planes of ``x`` (float32, any shape): bfloat16 and int16 of the same shape."""
    bits = x.contiguous().view(torch.int32)
    nan = (bits & _MAGNITUDE) > _INFINITY
    # Shifted arithmetically, the sum's upper half is right even where the sum overflows into the sign.
    high = torch.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16).to(torch.int16)
    low = torch.where(nan, 0, bits).to(torch.int16)
    return high.view(torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 whose planes are ``high`` (bfloat16) and ``low`` (int16)."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """``x`` (float32) rounded to bf16 as the upper plane is, still as float32."""
    return split(x)[0].float()
