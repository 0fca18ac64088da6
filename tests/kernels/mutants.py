"""Breaks the kernels in ways that matter, one at a time, and says which of them the interpreted tests notice.

``python -m tests.kernels.mutants`` works on copies; its last line is one JSON object.
"""

from __future__ import annotations

import sys

from tests import mutation

HERE = "tests/kernels/interpreted"


def Mutant(  # noqa: N802 (it makes one)
    name: str, file: str, old: str, new: str, tests: str = "test_adapter.py", survives: str = ""
) -> mutation.Mutant:
    """Of a file of ``kernels/triton``, with tests of this folder."""
    return mutation.Mutant(name, f"kernels/triton/{file}", old, new, f"{HERE}/{tests}", survives)


GRADIENTS = "test_adapter.py::test_gradients"
BIAS = "test_adapter.py::test_bias_counts_for_the_choice_alone"
INT8 = "test_adapter.py::test_eight_bit_keys"

MUTANTS = [
    # Bounds and masks.
    Mutant("tokens beyond the last route", "route.py", "real = token < tokens", "real = token < tokens + 1"),
    Mutant("columns beyond the width count", "common.py", "inside = column < WIDTH", "inside = column < WIDTH + 1"),
    Mutant("experts beyond the last count", "route.py", "present = expert < num_experts", "present = expert >= 0"),
    Mutant(
        "only the first tile of an expert", "score.py", "real = place < count", "real = place < tl.minimum(count, 3)"
    ),
    Mutant("a row of the next expert", "score.py", "row = expert * EXPERT_ROWS", "row = (expert + 1) * EXPERT_ROWS"),
    Mutant("all padded places are picks", "pick.py", "kept = (place < TOP_K) & (best > 0)", "kept = best > 0"),
    Mutant(
        "the last pick of a row is left out",
        "row_gradients.py",
        "present = at < end",
        "present = at < end - 1",
        GRADIENTS,
    ),
    Mutant("picks that are not valid", "combine.py", ".to(tl.int32) > 0", ".to(tl.int32) >= 0", "test_rows.py"),
    Mutant(
        "rows beyond the count", "return_gradients.py", "tl.load(COUNT), tl", "tl.load(COUNT) + 1, tl", "test_rows.py"
    ),
    # Ties and order.
    Mutant("ties to the highest", "common.py", "| (0x7FFFFFFF - place)", "| (place)"),
    Mutant("NaN is large", "common.py", "_NAN = tl.constexpr(-(2**31))", "_NAN = tl.constexpr(2**31 - 1)"),
    Mutant(
        "-0 is below 0",
        "common.py",
        "tl.where(x == 0.0, 0.0, x)",
        "x",
        "test_adapter.py::test_both_zeros_tie",
        survives="a sum that starts at 0 is never -0; tensor cores may leave that 0 out, an interpreter does not",
    ),
    Mutant("zeros are activations", "pick.py", "activation > 0.0", "activation >= 0.0"),
    Mutant("ties at the cap to the last", "select_largest.py", "(earlier < ties)", "(earlier >= ties)", "test_rows.py"),
    Mutant("a digit too many is taken", "select_largest.py", "digits > found", "digits >= found", "test_rows.py"),
    Mutant("experts in the order of their logits", "route.py", "pairs = tl.sort(pairs, dim=1)", "pass"),
    # Gates.
    Mutant("gates have a sum of 1", "route.py", "[:, None] * PER_TOKEN", "[:, None]"),
    Mutant("the bias gates", "route.py", "tl.where(taken, found, 0.0)", "tl.where(taken, wanted, 0.0)", BIAS),
    Mutant("the gate is left out of the gradient", "pick_gradients.py", "dots * gate, 0.0", "dots, 0.0", GRADIENTS),
    Mutant(
        "gate gradients go to the first expert",
        "pick_gradients.py",
        "slot[:, None] ==",
        "(slot * 0)[:, None] ==",
        GRADIENTS,
    ),
    Mutant(
        "the center is not subtracted",
        "common.py",
        "x.to(tl.float32) - tl.load(CENTER",
        "x.to(tl.float32) - 0 * tl.load(CENTER",
        GRADIENTS,
    ),
    Mutant(
        "the center is left in the keys' gradient",
        "row_gradients.py",
        "key -= tl.sum(total, 0)",
        "key -= 0 * tl.sum(total, 0)",
        GRADIENTS,
    ),
    # The cap.
    Mutant("one row too few", "cap.py", "tl.minimum(count, cap)", "tl.minimum(count, cap) - 1", "test_rows.py"),
    Mutant("dropped picks stay", "cap.py", "KEPT_VALID + pick, moved >= 0", "KEPT_VALID + pick, valid", "test_rows.py"),
    Mutant(
        "mass of the first picks",
        "cap.py",
        "total += tl.load(ACTIVATIONS + pick, mask=at < end",
        "total += tl.load(ACTIVATIONS + pick, mask=at < start + 2",
        "test_rows.py",
    ),
    Mutant(
        "the last row has no end",
        "compact.py",
        "other=rows)\n    tl.store(ENDS",
        "other=row)\n    tl.store(ENDS",
        "test_rows.py",
    ),
    # Residency.
    Mutant("stale rows are hits", "gather.py", "!= version)", "> version)", "test_gather.py"),
    Mutant(
        "a version is not noted",
        "gather.py",
        "tl.store(VERSION_OF_SLOT + slot, version, mask=held)",
        "pass",
        "test_gather.py",
    ),
    Mutant(
        "a slot in use is given away", "gather.py", "now - tl.load(USED", "1 + now - tl.load(USED", "test_gather.py"
    ),
    Mutant(
        "the newest are given away",
        "gather.py",
        "now - tl.load(USED + slot, mask=inside, other=0)",
        "tl.load(USED + slot, mask=inside, other=0) * (now - tl.load(USED + slot, mask=inside, other=0) > 0)",
        "test_gather.py",
    ),
    Mutant(
        "victims keep their row",
        "gather.py",
        "tl.store(SLOT_OF_ROW + row, tl.full((BLOCK,), -1, tl.int32), mask=row >= 0)",
        "pass",
        "test_gather.py",
    ),
    Mutant(
        "more rows than slots", "gather.py", "given = tl.minimum(missing, free)", "given = missing", "test_gather.py"
    ),
    Mutant(
        "rows of the device come from the host", "gather.py", "if copied == 2:", "if copied == 3:", "test_gather.py"
    ),
    Mutant(
        "rows of the device are not counted",
        "gather.py",
        "owned += tl.sum(here",
        "owned += 0 * tl.sum(here",
        "test_gather.py",
    ),
    Mutant("a use is not noted", "gather.py", "tl.store(USED + slot, stamp, mask=held)", "pass", "test_gather.py"),
    # Sums and types.
    Mutant(
        "slots that hold something are overwritten",
        "row_gradients.py",
        "FRESH + position) == 0",
        "FRESH + position) == 7",
        "test_rows.py",
    ),
    Mutant(
        "rows without a slot fall into the last",
        "row_gradients.py",
        "(slot >= 0) & ",
        "(slot >= -1) & ",
        "test_rows.py",
    ),
    Mutant(
        "rows rounded to bf16",
        "combine.py",
        "mask=valid[:, None] & inside[None, :], other=0).to(tl.float32)",
        "mask=valid[:, None] & inside[None, :], other=0).to(tl.bfloat16).to(tl.float32)",
        "test_rows.py::test_combined_rows_are_added_to_what_is_there",
    ),
    Mutant("scales are left out", "score.py", "scores *= tl.load(SCALES", "scores *= 0 * tl.load(SCALES", INT8),
    Mutant("moments round to nearest", "adam.py", "+ random) >> 16", "+ 0x8000) >> 16", "test_adam.py"),
    Mutant("ties of planes to even", "adam.py", "(bits + 0x8000) >> 16)", "(bits + 0x7FFF) >> 16)", "test_adam.py"),
    Mutant("random bits by place", "adam.py", "tl.load(IDS + at)", "tl.load(ROWS + at)", "test_adam.py"),
    Mutant("the step is not counted", "adam.py", "tl.store(STEP + row, now)", "pass", "test_adam.py"),
]


if __name__ == "__main__":
    sys.exit(not mutation.report(MUTANTS, {"TRITON_INTERPRET": "1"}))
