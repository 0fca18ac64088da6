"""Passes over scattered rows: compiled and in PyTorch they give the same bits, which a float64 oracle bounds."""

from __future__ import annotations

import ctypes
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from meft_kernels import planes
from meft_kernels import rows as in_torch
from meft_kernels.cpu import build, native_rows
from meft_kernels.rows import AdamStep, Coast, RowTable, paired_moments

ROWS = 23
# On and around multiples of the 16 columns of a vector step and of the 64 of a chunk.
WIDTHS = [1, 7, 16, 31, 128, 129, 577]
BETAS, EPS = (0.9, 0.97), 1e-6
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def libraries(compiled_passes) -> dict[str, ctypes.CDLL]:
    return {kind: build.build(kind) for kind in ("native", "portable")}


@pytest.fixture(params=["native", "portable"])
def compiled(request, libraries, monkeypatch) -> ModuleType:
    """The compiled passes, with this machine's instructions and with those of every machine."""
    monkeypatch.setattr(native_rows, "library", lambda: libraries[request.param])
    return native_rows


def make_table(width: int, master: torch.dtype, moments: torch.dtype) -> RowTable:
    """Masters and moments over eight orders of magnitude."""
    w = torch.randn(ROWS, width) * torch.logspace(-6, 2, ROWS)[:, None]
    m, v = torch.randn(ROWS, width) * 1e-2, torch.rand(ROWS, width) ** 8
    high, low = planes.split(w) if master == BF16 else (w, None)
    step = torch.randint(0, 400, (ROWS,)).int()
    return RowTable(high, low, *laid_out(m.to(moments), v.to(moments)), step)


def laid_out(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of moments, placed as the passes want them."""
    return paired_moments(torch.stack((v, m), dim=2)) if m.dtype == BF16 else (m.clone(), v.clone())


def copy_of(table: RowTable) -> RowTable:
    low = table.low.clone() if table.low is not None else None
    return RowTable(table.high.clone(), low, *laid_out(table.exp_avg, table.exp_avg_sq), table.step.clone())


def masters(table: RowTable) -> Tensor:
    return planes.join(table.high, table.low) if table.low is not None else table.high


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(found: RowTable | tuple[Tensor, ...], expected: RowTable | tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(bits(ours), bits(theirs))


def some_rows(count: int) -> Tensor:
    """Distinct, and in no order."""
    return torch.randperm(ROWS)[:count]


STEP = AdamStep(grad_scale=0.37, lr=1e-2, betas=BETAS, eps=EPS, decay=1 - 1e-2 * 0.3, seed=(1 << 64) - 12345)


def make_coast(count: int, pairs: int = 3) -> Coast:
    """Four idle times, one of which is none at all."""
    lines = torch.rand(4, 3 + 2 * pairs) * torch.tensor([1.0, 0.9, 0.99] + [1e-2, 1.0] * pairs)
    lines[2] = torch.tensor([1.0, 1.0, 1.0] + [0.0, 1.0] * pairs)
    return Coast(torch.randint(0, 4, (count,)).int(), lines)


def scaled_gradient(count: int, width: int) -> Tensor:
    return torch.randn(count, width) * 10.0 ** torch.randint(-4, 3, (count, 1))


@pytest.mark.parametrize("coasting", [False, True])
@pytest.mark.parametrize("now", [0, 1, 271])
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("master", [FP32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_adam_rows_gives_the_same_bits_in_pytorch_and_compiled(compiled, width, master, moments, now, coasting):
    """For any number of threads, over rows in no order; rows that are not named keep theirs."""
    table, rows = make_table(width, master, moments), some_rows(ROWS - 4)
    grad, step = scaled_gradient(len(rows), width), STEP._replace(now=now)
    coast = make_coast(len(rows)) if coasting else None
    expected = copy_of(table)
    assert in_torch.adam_rows(expected, rows, grad, step, coast) == 0
    for threads in (1, 2, 3):
        found = copy_of(table)
        assert compiled.adam_rows(found, rows, grad, step, coast, threads=threads) == 0
        assert_same_bits(found, expected)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, rows, False)
    for new, old in zip(expected, table, strict=True):
        if new is not None:
            assert torch.equal(bits(new)[others], bits(old)[others])
            # Three bits of four of a bf16 moment may well stay, but not all of a row of any width.
            assert width < 7 or (bits(new) != bits(old))[rows].reshape(len(rows), -1).any(1).all()
    assert torch.equal(expected.step[rows], table.step[rows] + 1 if now == 0 else torch.full_like(rows, now).int())


@pytest.mark.parametrize("coasting", [False, True])
@pytest.mark.parametrize("master", [FP32, BF16])
@pytest.mark.parametrize("module", ["native", "pytorch"])
def test_adam_rows_is_the_formula_in_float64(module, master, coasting, request):
    passes = request.getfixturevalue("libraries") and native_rows if module == "native" else in_torch
    table, rows = make_table(31, master, FP32), some_rows(13)
    grad, step = scaled_gradient(13, 31), STEP
    coast = make_coast(13) if coasting else None
    w, m, v = (x[rows].double() for x in (masters(table), table.exp_avg, table.exp_avg_sq))
    if coast is not None:
        lines = coast.coefficients[coast.of_row.long()].double()[..., None]
        move = sum(lines[:, k] / (v.sqrt() * lines[:, k + 1] + EPS) for k in (3, 5, 7))
        w, m, v = w * lines[:, 0] - m * move, m * lines[:, 1], v * lines[:, 2]
        assert torch.allclose(passes.read_coasted(table, rows, coast, EPS, threads=2).double(), w, rtol=1e-5, atol=1e-6)
    g = grad.double() * step.grad_scale
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    t = table.step[rows].double()[:, None] + 1
    w = step.decay * w - step.lr * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    passes.adam_rows(table, rows, grad, step, coast, threads=2)
    for found, expected in zip((masters(table), *table[2:4]), (w, m, v), strict=True):
        torch.testing.assert_close(found[rows].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", [0, 1, 5])
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("master", [FP32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_read_coasted_gives_the_same_bits_and_changes_nothing(compiled, width, master, moments, pairs):
    table, rows = make_table(width, master, moments), torch.randint(0, ROWS, (40,))
    before, coast = copy_of(table), make_coast(40, pairs)
    expected = in_torch.read_coasted(table, rows, coast, EPS)
    for threads in (1, 2, 3):
        assert_same_bits((compiled.read_coasted(table, rows, coast, EPS, threads=threads),), (expected,))
    assert_same_bits(table, before)
    idle = coast.of_row == 2
    assert (
        torch.equal(expected[idle], masters(table)[rows[idle]])
        and (expected[~idle] != masters(table)[rows[~idle]]).any()
    )


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_blocks_of_the_pytorch_path_do_not_show(monkeypatch, block):
    """Down to a row each, where a block would be smaller than a row."""
    table, rows, grad = make_table(31, BF16, BF16), some_rows(19), scaled_gradient(19, 31)
    coast, results = make_coast(19), []
    for elements in (in_torch._BLOCK_ELEMENTS, block):
        monkeypatch.setattr(in_torch, "_BLOCK_ELEMENTS", elements)
        found = copy_of(table)
        results.append((in_torch.read_coasted(found, rows, coast, EPS), in_torch.squared_norms(grad)))
        in_torch.adam_rows(found, rows, grad, STEP, coast)
        results[-1] += tuple(found)
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather_rows(compiled, width, dtype):
    """The exact numbers, repeats and all; rows that a table lacks are refused rather than read."""
    high, rows = torch.randn(ROWS, width).to(dtype), torch.randint(0, ROWS, (40,))
    high[3], high[4] = math.nan, -math.inf
    for threads in (1, 2, 3):
        found = compiled.gather_rows(high, rows, threads=threads)
        assert found.dtype == FP32 and found.shape == (40, width)
        assert_same_bits((found,), (in_torch.gather_rows(high, rows),))
        # A bf16 is the upper half of an fp32, NaN or not.
        assert torch.equal(bits(found), bits(high)[rows].int() << (16 if dtype == BF16 else 0))
    for passes in (compiled, in_torch):
        for row in (-1, ROWS):
            with pytest.raises(IndexError):
                passes.gather_rows(high, torch.tensor([0, row]), threads=1)


@pytest.mark.parametrize("width", WIDTHS)
def test_accumulate_rows(compiled, width):
    """Added to what is there, or put in its place: a fresh row may hold anything before, NaN included."""
    slots, fresh, grad = some_rows(11), torch.arange(11) % 3 == 0, torch.randn(11, width)
    total = torch.randn(ROWS, width)
    total[slots[fresh]] = math.nan
    expected = total.clone()
    for slot, new, g in zip(slots.tolist(), fresh.tolist(), grad, strict=True):
        expected[slot] = g if new else expected[slot] + g
    for threads in (1, 2, 3):
        for passes in (compiled, in_torch):
            found = total.clone()
            passes.accumulate_rows(found, slots, fresh, grad, threads=threads)
            assert_same_bits((found,), (expected,))


@pytest.mark.parametrize("width", WIDTHS)
def test_squared_norms(compiled, width):
    """Against exact sums; squares that overflow or vanish in float32 count, and threads do not change a bit."""
    x = torch.randn(ROWS, width) * torch.logspace(-30, 30, ROWS)[:, None]
    exact = torch.tensor([math.fsum(value * value for value in row) for row in x.tolist()], dtype=torch.float64)
    found = [compiled.squared_norms(x, threads=threads) for threads in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for norms in (found[0], in_torch.squared_norms(x)):
        torch.testing.assert_close(norms, exact, rtol=1e-12, atol=0)
    x[2, -1], x[5, 0] = math.nan, -math.inf
    for norms in (compiled.squared_norms(x, threads=2), in_torch.squared_norms(x)):
        assert norms[2].isnan() and norms[5] == math.inf and norms.isfinite().sum() == ROWS - 2


@pytest.mark.parametrize("moments", [FP32, BF16])
def test_no_rows_are_no_work(compiled, moments):
    table, none, nothing = make_table(7, BF16, moments), torch.empty(0, dtype=torch.int64), torch.empty(0, 7)
    before, coast = copy_of(table), Coast(none.int(), torch.ones(0, 5))
    for passes in (compiled, in_torch):
        for idle in (None, coast):
            assert passes.adam_rows(table, none, nothing, STEP, idle, threads=2) == 0
        assert passes.read_coasted(table, none, coast, EPS, threads=2).shape == (0, 7)
        assert passes.gather_rows(table.high, none, threads=2).shape == (0, 7)
        assert passes.squared_norms(nothing, threads=2).shape == (0,)
        passes.accumulate_rows(table.exp_avg.float(), none, none.bool(), nothing, threads=2)
    assert_same_bits(table, before)


def float_of(pattern: int) -> Tensor:
    return torch.tensor(pattern - (pattern >> 31 << 32), dtype=torch.int32).view(FP32)


@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("master", [FP32, BF16])
@pytest.mark.parametrize("column", [0, 15, 127, 130])
def test_a_nan_is_counted_and_stays_one_where_the_model_reads(compiled, column, master, moments):
    """One whose payload rounding would carry over into a zero of the other sign, too; at any place of a row."""
    payloads = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0xFFC00000, 0x7FFF8000]
    table, rows, n = make_table(131, master, moments), some_rows(9), len(payloads)
    grad, step = torch.randn(9, 131), STEP
    grad[:n, column] = torch.stack([float_of(pattern) for pattern in payloads])
    expected = copy_of(table)
    assert in_torch.adam_rows(expected, rows, grad, step) == n
    assert compiled.adam_rows(table, rows, grad, step, threads=2) == n
    for found in (table, expected):
        nan = found.high.float().isnan()
        assert nan.nonzero().tolist() == [[row, column] for row in sorted(rows[:n].tolist())]
        assert torch.equal(masters(found).isnan(), nan)
        assert found.low is None or not found.low[nan].any()
    assert_same_bits(
        tuple(x[rows[n:]] for x in table if x is not None), tuple(x[rows[n:]] for x in expected if x is not None)
    )
    assert torch.equal(masters(table).nan_to_num(), masters(expected).nan_to_num())


@pytest.mark.parametrize("coasting", [False, True])
@pytest.mark.parametrize("width", [7, 31, 131])
def test_rows_beyond_the_range_of_the_compute_copy_are_counted(compiled, width, coasting):
    """A finite master may be infinite in bf16: rows are counted, once each, by what the model would read."""
    edge = [0x7F7F7FFF, 0x7F7F8000, 0xFF7F7FFF, 0xFF7F8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F000000]
    values = torch.stack([float_of(pattern) for pattern in edge])
    # Decay 1 and no gradient on no moments: the masters stay as they are.
    rows = some_rows(len(edge))
    step = STEP._replace(decay=1.0)
    coast = Coast(torch.zeros(len(edge), dtype=torch.int32), torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]]))
    for master, count in ((BF16, 5), (FP32, 2)):
        for column in {0, width // 2, width - 1}:
            w = torch.zeros(ROWS, width)
            w[rows, column] = values
            w[rows, 0] = values
            high, low = planes.split(w) if master == BF16 else (w, None)
            moments = paired_moments(torch.zeros(ROWS, width, 2, dtype=BF16))
            table = RowTable(high, low, *moments, torch.zeros(ROWS, dtype=torch.int32))
            for passes in (compiled, in_torch):
                found, grad = copy_of(table), torch.zeros(len(edge), width)
                assert passes.adam_rows(found, rows, grad, step, coast if coasting else None, threads=2) == count
                assert_same_bits(found[:4], table[:4])


def test_what_the_compiled_passes_would_misread_is_refused(libraries):
    """Raw pointers know neither types nor strides."""
    table, rows, step = make_table(8, BF16, FP32), some_rows(3), STEP
    grad = torch.randn(3, 8)
    for bad_rows, bad_grad in ((rows.int(), grad), (rows, grad.double()), (rows, torch.randn(8, 3).T)):
        with pytest.raises(AssertionError):
            native_rows.adam_rows(table, bad_rows, bad_grad, step, threads=1)
    with pytest.raises(AssertionError):
        native_rows.adam_rows(table._replace(exp_avg_sq=table.exp_avg_sq.bfloat16()), rows, grad, step, threads=1)
    with pytest.raises(AssertionError):
        native_rows.gather_rows(torch.randn(8, ROWS).T, rows, threads=1)
