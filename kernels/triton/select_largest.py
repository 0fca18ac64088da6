"""Which of many numbers are the k largest, ties going to the lowest place: for one program, over any count.

A radix select: the k-th largest value is found digit by digit, from a histogram of each digit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kth_largest(PRIORITIES, count, wanted, BLOCK: tl.constexpr):
    """The ``wanted``-th largest of PRIORITIES [count] (int32), and how many equal to it are among the ``wanted``
    largest.

    Priorities are not negative, and those of 0 are no candidates: ``wanted`` is at most the number of others. Of no
    candidate, when ``wanted`` is 0, the answer is the largest int32 and 0.
    """
    value = count * 0
    left = wanted + value
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            priority = tl.load(PRIORITIES + at, mask=at < count, other=0)
            candidate = priority > 0
            if digit > 0:
                candidate = candidate & ((priority >> (shift + 8)) == value)
            histogram += tl.histogram((priority >> shift) & 255, 256, mask=candidate)
        # The highest digit of which, with all higher ones, there are enough.
        digits = tl.arange(0, 256)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        found = tl.max(tl.where(at_least >= tl.maximum(left, 1), digits, 0), 0)
        left -= tl.sum(tl.where(digits > found, histogram, 0), 0)
        value = (value << 8) | found
    none = wanted < 1
    return tl.where(none, 0x7FFFFFFF, value), tl.where(none, 0, left)


@triton.jit
def among_largest(priority, threshold, ties, ties_before):
    """Of a block of priorities: which are among the largest (int32 of 0 and 1), and how many ties there are by now.

    Args:
        threshold, ties: what :func:`kth_largest` says. ties_before: in earlier blocks.
    """
    tied = ((priority == threshold) & (priority > 0)).to(tl.int32)
    earlier = ties_before + tl.cumsum(tied, 0) - tied
    chosen = ((priority > threshold) & (priority > 0)) | ((tied > 0) & (earlier < ties))
    return chosen.to(tl.int32), ties_before + tl.sum(tied, 0)
