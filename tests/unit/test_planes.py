"""The two 16-bit planes of an fp32, over whole ranges of bit patterns and against exact integers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from meft_kernels.planes import join, rounded, split

LOW_HALVES = torch.arange(1 << 16)
# The seven bits of a mantissa's upper half: the ends, where rounding carries, and some between.
MANTISSAS = [0x00, 0x2A, 0x7F]
LARGEST_BF16 = 0x7F7F


def floats(patterns: Tensor) -> Tensor:
    """Bit patterns of 0 to 2³² − 1 as float32."""
    return (patterns - ((patterns >> 31) << 32)).to(torch.int32).view(torch.float32)


def patterns(x: Tensor) -> Tensor:
    """The bits of float32 or of 16-bit numbers, as int64 from 0."""
    wide = x.element_size() == 4
    return x.view(torch.int32 if wide else torch.int16).long() & (0xFFFFFFFF if wide else 0xFFFF)


def every_low_half(exponent: int) -> Tensor:
    """[2, mantissas, 65536]: all low halves, of both signs and all of ``MANTISSAS``."""
    uppers = torch.tensor([[s << 15 | exponent << 7 | m for m in MANTISSAS] for s in (0, 1)])
    return uppers[..., None] << 16 | LOW_HALVES


@pytest.mark.parametrize("first", range(0, 256, 32))
def test_planes_join_to_the_number_bit_for_bit(first):
    """Every low half at every exponent: subnormals, infinities and both zeros too; of NaN, that it is one."""
    for exponent in range(first, first + 32):
        bits = every_low_half(exponent)
        x = floats(bits)
        high, low = split(x)
        assert (high.dtype, low.dtype, high.shape, low.shape) == (torch.bfloat16, torch.int16, x.shape, x.shape)
        nan = x.isnan()
        assert int(nan.sum()) == (2 * (len(MANTISSAS) << 16) - 2 if exponent == 255 else 0)
        joined = join(high, low)
        assert joined.dtype == torch.float32
        assert torch.equal(patterns(joined)[~nan], bits[~nan])
        assert joined[nan].isnan().all() and high[nan].float().isnan().all()
        assert torch.equal(joined[nan].signbit(), x[nan].signbit())


@pytest.mark.parametrize("first", range(0, 255, 51))
def test_the_upper_plane_is_the_nearest_bf16_and_of_two_the_larger_in_magnitude(first):
    """Integers say which is nearest: within one binade, and across its end, bit patterns are evenly spaced.

    torch's own rounding differs in ties alone, of which every second goes to the other side.
    """
    for exponent in range(first, first + 51):
        bits = every_low_half(exponent)
        x, magnitude, sign = floats(bits), bits & 0x7FFFFFFF, bits >> 31
        below = magnitude >> 16
        to_below, to_above = magnitude - (below << 16), ((below + 1) << 16) - magnitude
        nearest = torch.where(to_below < to_above, below, below + 1)
        high = split(x)[0]
        assert torch.equal(patterns(high), nearest | sign << 15)
        assert torch.equal(rounded(x), high.float())
        tie = to_below == to_above
        assert torch.equal(high[~tie], x.bfloat16()[~tie])
        differs = (patterns(high) != patterns(x.bfloat16())) & tie
        assert torch.equal(differs, tie & (below % 2 == 0)) and differs.any()


def test_halfway_is_away_from_zero_in_exact_numbers():
    for mantissa in range(128):
        for sign in (1, -1):
            number = sign * (1 + Fraction(2 * mantissa + 1, 256)) * 8
            x = torch.tensor(float(number))
            found = Fraction(float(rounded(x)))
            assert Fraction(float(x)) == number and found - number == sign * Fraction(8, 256)


def test_special_numbers():
    """Infinities stay, zero keeps its sign, and only what rounds beyond the largest bf16 becomes infinite."""
    x = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    high, low = split(x)
    assert patterns(high).tolist() == [0x7F80, 0xFF80, 0x0000, 0x8000] and low.tolist() == [0, 0, 0, 0]
    edge = torch.tensor([0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF])
    for sign in (0, 1 << 31):
        high, low = split(floats(edge | sign))
        assert patterns(high).tolist() == [LARGEST_BF16 | sign >> 16, 0x7F80 | sign >> 16, 0x7F80 | sign >> 16]
        assert torch.equal(patterns(join(high, low)), edge | sign)


def test_a_nan_stays_one_whatever_its_payload():
    """One that rounding would carry into the sign, and one whose payload stands in the lower half alone."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FFF8000, 0x7F800001, 0x7F807FFF, 0x7F808000, 0x7FC00000, 0x7FBFFFFF])
    bits = torch.cat([bits, bits | 1 << 31])
    high, low = split(floats(bits))
    assert high.isnan().all() and join(high, low).isnan().all()
    assert torch.equal(high.float().signbit(), bits >> 31 == 1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7), (2, 3, 1)])
def test_shapes_stay_and_views_are_read_rightly(shape):
    x = torch.randn(shape)
    high, low = split(x)
    assert high.shape == low.shape == x.shape
    assert torch.equal(join(high, low), x)


def test_a_transposed_view_and_every_other_column():
    x = torch.randn(6, 8)
    for view in (x.T, x[:, ::2], x[1::3]):
        before = view.clone()
        assert torch.equal(join(*split(view)), before) and torch.equal(view, before)
