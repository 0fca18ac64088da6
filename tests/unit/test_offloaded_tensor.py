"""`PartiallyOffloadedTensor`: what readers see, and what becomes of gradients."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import meft_engine
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.updates import StaleRowsError
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.planner import host_bytes_needed
from tests.families import tiny_config

ROWS, WIDTH = 37, 13
DTYPES = [torch.float32, torch.bfloat16]


def table(dtype: torch.dtype = torch.float32, resident: bool = False, **kwargs) -> PartiallyOffloadedTensor:
    made = PartiallyOffloadedTensor(
        "layer/keys", ROWS, WIDTH, device="cpu", compute_dtype=dtype, resident=resident, **kwargs
    )
    made.fill(torch.randn(ROWS, WIDTH))
    return made


def whole(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [False, True])
def test_gather_gives_rows_of_the_compute_copy_as_fp32(dtype, resident):
    rows = torch.tensor([36, 0, 7, 7])
    tensor = table(dtype, resident)
    # Eighths of the distance between two bf16, which tell rounding from truncation; halfway is away from zero.
    tensor.write(torch.tensor([7]), torch.tensor([[1 + k * 2**-10 for k in range(WIDTH)]]))
    expected = tensor.master[rows].to(dtype).float()
    if dtype == torch.bfloat16:
        expected[2:] = torch.tensor([1 + (k + 4) // 8 * 2**-7 for k in range(WIDTH)])
    found = tensor.gather(rows)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(found, tensor.master[rows]) == (dtype == torch.float32)
    # What the caller does to the gathered rows stays with the caller.
    found.zero_()
    assert torch.equal(tensor.gather(rows), expected)
    assert tensor.gather(rows[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_takes_any_float_and_refuses_another_shape(dtype):
    tensor, source = table(dtype), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    version = tensor.version
    tensor.fill(source)
    assert torch.equal(tensor.master, source.float()) and tensor.version > version
    assert torch.equal(tensor.gather(torch.arange(ROWS)), source.float().to(dtype).float())
    for shape in ((ROWS, 1), (1, WIDTH), (WIDTH, ROWS)):
        with pytest.raises(ValueError, match=rf"layer/keys holds \({ROWS}, {WIDTH}\), not \({shape[0]}, {shape[1]}\)"):
            tensor.fill(torch.zeros(shape))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_changes_the_named_rows_and_no_others(dtype, resident):
    """In the order in which they are named, masters and compute copies alike."""
    tensor, source = table(dtype, resident), torch.randn(2, WIDTH, dtype=torch.float64)
    before = tensor.master.clone(), tensor.gather(torch.arange(ROWS))
    tensor.write(torch.tensor([31, 2]), source)
    after = tensor.master, tensor.gather(torch.arange(ROWS))
    for old, new, expected in zip(before, after, (source.float(), source.float().to(dtype).float()), strict=True):
        assert (new != old).any(1).nonzero().flatten().tolist() == [2, 31]
        assert torch.equal(new[[31, 2]], expected)
    if resident:
        assert torch.equal(tensor.compute_copy().float(), after[1])


def test_a_value_beyond_bf16_is_refused_and_nothing_is_written():
    """The largest master that still rounds to a finite bf16 is taken; what was infinite before stays so."""
    largest, tensor = torch.tensor(0x7F7F7FFF, dtype=torch.int32).view(torch.float32), table(torch.bfloat16)
    before, rows = tensor.master, torch.tensor([3])
    beyond = torch.nextafter(largest, torch.tensor(math.inf))
    for bad in (beyond, -beyond, torch.tensor(torch.finfo(torch.float32).max)):
        with pytest.raises(ValueError, match=r"layer/keys is given 3\.\d+e\+38, which is beyond the range of bf16"):
            tensor.write(rows, torch.zeros(1, WIDTH).index_fill_(1, torch.tensor([5]), bad))
    assert torch.equal(tensor.master, before)
    given_values = torch.stack([largest, -largest, torch.tensor(math.inf), torch.tensor(-math.inf)]).repeat(4)[:WIDTH]
    tensor.write(rows, given_values[None])
    assert torch.equal(tensor.master[3], given_values)
    assert tensor.gather(rows)[0, :3].tolist() == [
        torch.finfo(torch.bfloat16).max,
        torch.finfo(torch.bfloat16).min,
        math.inf,
    ]
    whole_table = table()
    whole_table.write(rows, torch.full((1, WIDTH), float(beyond)))
    assert torch.equal(whole_table.master[3], beyond.expand(WIDTH))


def test_a_master_of_planes_is_a_copy():
    tensor = table(torch.bfloat16)
    kept = tensor.master.clone()
    tensor.master.zero_()
    assert torch.equal(tensor.master, kept) and tensor.planes()[1].dtype == torch.int16


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_takes_the_planes_of_another_table(dtype):
    """Masters arrive bit for bit, in a table of either precision."""
    source, tensor = table(torch.bfloat16), table(dtype)
    tensor.fill(*source.planes())
    assert torch.equal(tensor.master.view(torch.int32), source.master.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_an_update_replaced_are_refused(dtype):
    """The version counts every write; a reader that names the version it saw is told when it is gone."""
    tensor, rows = table(dtype), torch.tensor([3])
    seen = tensor.version
    tensor.gather(rows, seen)
    tensor.write(rows, tensor.master[rows])
    assert tensor.version == seen + 1
    with pytest.raises(StaleRowsError, match=rf"layer/keys .*version {seen}, now {seen + 1}.* backward before step"):
        tensor.gather(rows, seen)
    tensor.gather(rows, seen + 1)
    tensor.gather(rows)


def test_only_a_resident_tensor_has_a_whole_copy_on_the_device():
    with pytest.raises(RuntimeError, match="layer/keys is not resident"):
        table().compute_copy()
    resident = table(torch.bfloat16, resident=True)
    assert torch.equal(resident.compute_copy(), resident.master.bfloat16())


@given(
    calls=st.lists(st.sets(st.integers(0, ROWS - 1), max_size=9), max_size=7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_accumulation_equals_a_dense_accumulator(calls, dtype):
    """Whole numbers, which every dtype holds exactly: overlapping, equal, disjoint and empty sets of rows.

    Rows stand in the order of their first appearance.
    """
    tensor, dense = table(), torch.zeros(ROWS, WIDTH)
    for call in calls:
        rows, grad = torch.tensor(sorted(call), dtype=torch.int64), whole(len(call), WIDTH).to(dtype)
        dense.index_add_(0, rows, grad.float())
        tensor.accumulate(rows, grad)
    touched = list(dict.fromkeys(row for call in calls for row in sorted(call)))
    gradient = tensor.gradient()
    if not touched:
        assert gradient is None
    else:
        assert gradient.rows.tolist() == touched and gradient.grad.dtype == torch.float32
        assert torch.equal(gradient.grad, dense[touched])
    tensor.clear_gradient()
    assert tensor.gradient() is None


@pytest.mark.parametrize("second", [[1, 5, 30], [0, 5, 36], [2]])
def test_the_first_gradient_is_taken_over_and_later_ones_are_only_read(second):
    """The row ids of a selection are shared with the autograd graph, so they stay as they are too."""
    tensor, first = table(), torch.tensor([1, 5, 30])
    grads = [whole(3, WIDTH), whole(len(second), WIDTH), whole(len(second), WIDTH)]
    kept, later = [g.clone() for g in grads], torch.tensor(second)
    tensor.accumulate(first, grads[0])
    assert tensor.gradient().grad.data_ptr() == grads[0].data_ptr()
    for grad in grads[1:]:
        tensor.accumulate(later, grad)
    assert torch.equal(grads[1], kept[1]) and torch.equal(grads[2], kept[2])
    assert first.tolist() == [1, 5, 30] and later.tolist() == second
    expected = torch.zeros(ROWS, WIDTH).index_add_(0, first, kept[0]).index_add_(0, later, kept[1] + kept[2])
    assert torch.equal(tensor.gradient().grad, expected[tensor.gradient().rows])


def test_norms_that_came_with_a_gradient_hold_until_it_changes():
    tensor, rows, grad = table(), torch.tensor([1, 5, 30]), whole(3, WIDTH)
    assert tensor.squared_gradient_norm() == 0.0
    tensor.accumulate(rows, grad, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert tensor.squared_gradient_norm() == 7.0  # as given, which nobody else would say
    tensor.gradient().grad[0, 3] = 100.0
    assert tensor.squared_gradient_norm() == float(grad.double().square().sum())
    tensor.gradient().grad[2, 0] = math.nan
    assert math.isnan(tensor.squared_gradient_norm())

    tensor.clear_gradient()
    assert tensor.squared_gradient_norm() == 0.0
    first, second = whole(3, WIDTH), whole(3, WIDTH)
    expected = float((first + second).double().square().sum())
    for grad in (first, second):
        tensor.accumulate(rows, grad, torch.ones(3, dtype=torch.float64))
    assert tensor.squared_gradient_norm() == expected
    tensor.replace_gradient(rows, whole(3, WIDTH).fill_(2.0))
    assert tensor.squared_gradient_norm() == 3 * WIDTH * 4.0


def test_inference_keeps_no_gradient():
    tensor = table(trainable=False)
    tensor.accumulate(torch.tensor([1]), torch.ones(1, WIDTH))
    assert tensor.gradient() is None
    tensor.accumulate(torch.tensor([ROWS]), torch.ones(1, WIDTH))
    assert tensor.gradient() is None


@pytest.mark.parametrize("rows", [[3, -1], [ROWS, 0]])
def test_a_gradient_of_rows_that_the_table_lacks_is_refused(rows):
    tensor = table()
    with pytest.raises(IndexError, match=rf"layer/keys has {ROWS} rows; a gradient names rows {rows[1]} to {rows[0]}"):
        tensor.accumulate(torch.tensor(rows), torch.ones(2, WIDTH))
    assert tensor.gradient() is None


def test_a_module_does_not_see_it():
    """Neither casts nor moves nor saves nor copies of the module reach the table."""
    module = nn.Linear(2, 2)
    module.table = table()
    master = module.table.master
    module.to(torch.bfloat16).to("meta")
    assert (
        module.table.master.data_ptr() == master.data_ptr()
        and master.dtype == torch.float32
        and master.device.type == "cpu"
    )
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"} == set(module.state_dict())
    assert not list(module.buffers())
    with pytest.raises(RuntimeError, match="layer/keys cannot be deep-copied.* load the adapter"):
        copy.deepcopy(module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_bytes_are_those_allocated(dtype, resident, trainable):
    """Trained rows take 4 bytes an element in either precision; for inference bf16 takes 2."""
    tensor = table(dtype, resident, trainable=trainable)
    assert tensor.host_bytes() == ROWS * WIDTH * (4 if trainable else dtype.itemsize)
    element = dtype.itemsize
    assert tensor.device_bytes() == (ROWS * WIDTH * element if resident else 0)
    for count in (5, 3):
        tensor.gather(torch.arange(count))
    assert tensor.device_bytes() == (ROWS if resident else 5) * WIDTH * element


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_the_plan_is_what_is_allocated(dtype, trainable, moments):
    """Two layers: masters and, where they train, moments and steps."""
    config = tiny_config(optimizer={"moments_dtype": moments})
    shape = (config.adapter.rows, WIDTH)
    kinds = {"device": "cpu", "compute_dtype": dtype, "trainable": trainable}
    tables = [PartiallyOffloadedTensor(str(i), *shape, resident=i % 2 == 0, **kinds) for i in range(4)]
    allocated = sum(t.host_bytes() for t in tables)
    if trainable:
        allocated += SparseCPUAdam(tables, moments_dtype=DTYPES[moments == "bf16"]).host_bytes()
    assert host_bytes_needed(config, 2, WIDTH, compute_dtype=dtype, trainable=trainable) == allocated


MEASURE = """
import gc, psutil, torch
from meft_engine.offload.tensor import PartiallyOffloadedTensor
torch.set_num_threads(1)

def make(rows):
    return PartiallyOffloadedTensor(
        "t", rows, 1021, device="cpu", compute_dtype=torch.{dtype}, resident=False, huge_pages={huge_pages}
    )

make(5)  # loads what the first use loads
gc.collect()
before = psutil.Process().memory_info().rss
table = make({rows})
print(psutil.Process().memory_info().rss - before, table.host_bytes())
table.close()
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.parametrize(("dtype", "huge_pages"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_resident_memory_grows_by_the_bytes_reported(dtype, huge_pages):
    """2 GiB, in a process of its own: every page is there from the start, nothing is rounded up, close returns all."""
    rows = 525_837
    grown, reported, left = run_apart(MEASURE.format(dtype=dtype, rows=rows, huge_pages=huge_pages))
    assert reported == rows * 1021 * 4 == pytest.approx(2 << 30, rel=1e-4)
    assert grown == pytest.approx(reported, rel=0.02)
    assert left < 0.02 * reported


MEASURE_ATTACHED = """
import torch
from meft_engine.adapter.attach import attach
from meft_engine.config import MeftConfig
from meft_engine.optim.sparse_adam import SparseCPUAdam
from tests.families import tiny_block, tiny_llama
torch.set_num_threads(1)

# A process that has loaded a model holds much freed memory, in which new tensors would find room without it growing.
waste = [torch.ones(1 << 21) for _ in range(40)]
keep = [torch.ones(64) for _ in range(40)]
del waste
if torch.cuda.is_available():
    torch.ones(1, device="cuda")  # what CUDA itself takes is not the adapters'
config = MeftConfig.from_block(tiny_block({{"rows": 1 << 16, "num_experts": 256}}))
attached = attach(tiny_llama(), config, compute_dtype=torch.{dtype})
with attached.measured():
    optimizer = SparseCPUAdam(attached.tables())
print(attached.measured_bytes, sum(t.host_bytes() for t in attached.tables()) + optimizer.host_bytes())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_an_attached_adapter_measures_is_what_it_counts(dtype):
    """Also in a process whose allocator has room left."""
    measured, counted = run_apart(MEASURE_ATTACHED.format(dtype=dtype))
    assert counted > 140 << 20
    assert measured == pytest.approx(counted, rel=0.02)


def run_apart(code: str) -> list[int]:
    """The integers that some code prints in a process of its own."""
    root = os.path.dirname(os.path.dirname(meft_engine.__file__))
    tests = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, tests, *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
