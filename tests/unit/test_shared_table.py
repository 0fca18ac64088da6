"""A table that two ranks share, played by two objects over the same memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from meft_engine.config import OffloadConfig
from meft_engine.offload.shard import Shard
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from meft_engine.offload.updates import StaleRowsError
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_engine.parallel.sharding import owned_rows
from tests.late_copies import LateCopies

ROWS, WIDTH = 20, 5
DTYPES = [torch.float32, torch.bfloat16]


class Waiting(Exception):
    """Somebody would have to wait."""


def never(condition: Callable[[], bool]) -> None:
    if not condition():
        raise Waiting


def pair(
    dtype: torch.dtype, *, device: bool = False, shares_state: bool = False, visiting: bool = False
) -> list[PartiallyOffloadedTensor]:
    """Rank 0 owns rows 0 to 7, rank 1 the rest. A device holds all of them, or they are ``visiting`` one."""
    taken: list[list[Tensor]] = [[], []]

    def allocate(rank: int) -> Callable:
        def take(shape: Sequence[int], dtype: torch.dtype, present: Sequence[slice]) -> Tensor:
            place = len(taken[rank])
            other = taken[1 - rank]
            taken[rank].append(other[place] if place < len(other) else torch.zeros(shape, dtype=dtype))
            return taken[rank][-1]

        return take

    written, parts = torch.zeros(2, dtype=torch.int64), [slice(0, 8), slice(8, 20)]
    changed_at = torch.zeros(ROWS, dtype=torch.int32) if device else None
    tables = []
    for rank, part in enumerate(parts):
        shard = Shard(
            part, [part], allocate(rank), written, rank, never, changed_at, shares_state=shares_state, ranks_of_node=2
        )
        table = PartiallyOffloadedTensor(
            "layer/keys",
            ROWS,
            WIDTH,
            device="cpu",
            compute_dtype=dtype,
            resident=not visiting,
            shard=shard,
            traffic=Traffic.by(LateCopies(), OffloadConfig()) if visiting else None,
        )
        if device and not visiting:
            table._on_device = table._resident_on(torch.device("cpu"))
        tables.append(table)
    return tables


def masters(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_rank_fills_its_part_and_reads_all(dtype):
    one, other = pair(dtype)
    source = masters()
    one.fill(source)
    with pytest.raises(Waiting):
        one.gather(torch.tensor([0]))  # the other's part is still missing
    other.fill(source)
    for table in (one, other):
        everything = torch.arange(ROWS)
        assert torch.equal(table.gather(everything), source.to(dtype).float())
        assert torch.equal(table.master[table.owned], source[table.owned])
    assert torch.equal(one.planes()[0], other.planes()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares_state", [False, True])
def test_writing_leaves_rows_of_others_to_them(dtype, shares_state):
    one, other = pair(dtype, shares_state=shares_state)
    for table in (one, other):
        table.fill(masters())
    rows, changed = torch.tensor([19, 3]), masters(1)[:2]
    one.write(rows, changed)
    other.write(rows, changed)
    expected = masters().index_copy(0, rows, changed)
    assert torch.equal(one.master[one.owned], expected[one.owned])
    assert torch.equal(other.master[other.owned], expected[other.owned])
    if shares_state and dtype == torch.bfloat16:
        assert torch.equal(one.master, expected) and torch.equal(other.master, expected)


def test_of_rows_that_other_nodes_own_the_compute_copy_alone_is_written():
    """This node's copy of them is for this rank to write; their lower planes are at their owner's alone."""
    owned, written = slice(0, 8), torch.zeros(1, dtype=torch.int64)
    shard = Shard(
        owned, [owned, slice(8, 20)], lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), written, 0, never
    )
    table = PartiallyOffloadedTensor(
        "layer/keys", ROWS, WIDTH, device="cpu", compute_dtype=torch.bfloat16, resident=True, shard=shard
    )
    table.fill(masters())
    rows, changed = torch.tensor([19, 3]), masters(1)[:2]
    table.write(rows, changed)
    expected = masters().index_copy(0, rows, changed)
    assert torch.equal(table.master[owned], expected[owned])
    assert torch.equal(table.master[8:], expected[8:].bfloat16().float())


def test_a_value_that_cannot_be_held_changes_nothing():
    tables = pair(torch.bfloat16)
    for table in tables:
        table.fill(masters())
    bad = masters(1)
    bad[3] = 3.4e38
    with pytest.raises(ValueError, match="beyond the range of bf16"):
        tables[0].fill(bad)
    assert torch.equal(tables[0].gather(torch.arange(ROWS)), masters().bfloat16().float())


def test_updates_are_waited_for_on_whichever_rank():
    one, other = pair(torch.float32)
    for table in (one, other):
        table.fill(masters())
        table.expect_update(None)
    with one.writing():
        pass
    for table in (one, other):
        with pytest.raises(Waiting):
            table.gather(torch.tensor([1]))
    with other.writing():
        pass
    assert one.gather(torch.tensor([1])).shape == (1, WIDTH) and one.version == other.version == 2


def test_a_rank_whose_update_failed_is_unreadable_and_never_done():
    one, other = pair(torch.float32)
    for table in (one, other):
        table.fill(masters())
        table.expect_update(None)
    with pytest.raises(RuntimeError, match="oh"), one.writing():
        raise RuntimeError("oh")
    with other.writing():
        pass
    with pytest.raises(Waiting):
        other.gather(torch.tensor([0]))
    one.updates._wait = lambda condition: condition()  # whatever lets it through
    with pytest.raises(StaleRowsError, match="only half updated"):
        one.gather(torch.tensor([0]))
    for table in (one, other):
        table.fill(masters(2))
    assert torch.equal(one.gather(torch.arange(ROWS)), masters(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_visit_a_device_come_anew_where_any_rank_has_changed_them(dtype):
    one, other = pair(dtype, device=True, visiting=True)
    for table in (one, other):
        table.fill(masters())
    rows = torch.tensor([1, 5, 9, 19])

    def seen(table: PartiallyOffloadedTensor) -> Tensor:
        with table.rows_at(rows, keep=True) as at:
            return at.brought()

    assert all(torch.equal(seen(table), masters()[rows].to(dtype).float()) for table in (one, other))
    changed = masters()
    changed[[5, 19]] = masters(3)[:2]
    for table in (one, other):
        table.write(torch.tensor([5, 19]), masters(3)[:2])
    assert all(torch.equal(seen(table), changed[rows].to(dtype).float()) for table in (one, other))
    assert [table.visits() for table in (one, other)] == [(2, 6), (2, 6)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_copies_rows_that_anyone_changed_and_no_others(dtype):
    one, other = pair(dtype, device=True)
    for table in (one, other):
        table.fill(masters())
    whole = torch.arange(ROWS)
    for table in (one, other):
        assert torch.equal(table.gather(whole), masters().to(dtype).float())
    expected = one._on_device.table.clone()
    one._on_device.table[[4, 15]] = 7.0  # a mark that only a copy takes away
    for table in (one, other):
        table.write(torch.tensor([2, 15]), masters(3)[:2])
    expected[torch.tensor([2, 15])] = masters(3)[:2].to(dtype)
    expected[4] = 7.0
    assert torch.equal(one.compute_copy(), expected)
    one._on_device.table[2] = 9.0
    expected[2] = 9.0
    assert torch.equal(one.compute_copy(), expected), "what has not changed since is copied again"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["lazy", "dense_equivalent"])
@pytest.mark.parametrize("moments", DTYPES)
def test_two_halves_of_an_update_are_the_update_of_a_whole_table(dtype, mode, moments):
    """The state of every row is at its owner; bytes add up to those of one table."""
    tables = pair(dtype, shares_state=mode == "dense_equivalent")
    whole = PartiallyOffloadedTensor("layer/keys", ROWS, WIDTH, device="cpu", compute_dtype=dtype, resident=True)
    settings = {"lr": 0.1, "weight_decay": 0.1, "mode": mode, "moments_dtype": moments, "seed": 3}
    optimizers = [SparseCPUAdam([table], **settings) for table in (*tables, whole)]
    for table in (*tables, whole):
        table.fill(masters())
    for step in range(4):
        rows = torch.tensor([1, 7, 8, 13] if step % 2 else [0, 7, 19])
        grad = masters(step + 5)[: len(rows)]
        for table in tables:
            mine = table.shard.is_owned(rows)
            table.replace_gradient(rows[mine], grad[mine])
        whole.accumulate(rows, grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = optimizers[2].state[whole.handle]
    for table, optimizer in zip(tables, optimizers, strict=False):
        part = table.owned
        assert torch.equal(table.master[part], whole.master[part])
        for kind, value in optimizer.state[table.handle].items():
            assert torch.equal(value[part], state[kind][part]), kind
        assert torch.equal(table.planes()[0], whole.planes()[0])
    assert sum(table.host_bytes() for table in tables) == whole.host_bytes()
    assert sum(optimizer.host_bytes() for optimizer in optimizers[:2]) == optimizers[2].host_bytes()


def test_an_update_without_rows_is_an_update():
    one, other = pair(torch.float32)
    optimizers = [SparseCPUAdam([table], lr=0.1) for table in (one, other)]
    for table in (one, other):
        table.fill(masters())
    one.replace_gradient(torch.tensor([3]), torch.ones(1, WIDTH))
    other.replace_gradient(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH))
    for optimizer in optimizers:
        optimizer.step()
    changed = (one.gather(torch.arange(ROWS)) != masters()).any(1).nonzero().flatten().tolist()
    assert changed == [3] and one.version == other.version


def test_a_reader_waits_in_its_thread():
    """Whoever reads on one rank goes on when the other has written."""
    one, other = pair(torch.float32)
    for table in (one, other):
        table.fill(masters())
        table.expect_update(None)
    done = threading.Event()
    one.updates._wait = lambda condition: [None for _ in iter(condition, True)]

    def read() -> None:
        one.gather(torch.tensor([0]))
        done.set()

    with one.writing():
        pass
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert not done.wait(0.05)
    with other.writing():
        pass
    assert done.wait(5)


@pytest.mark.parametrize(
    "rows, expert_rows, ranks", [(120, 10, 4), (120, 10, 5), (35, 7, 2), (35, 7, 8), (64, 64, 3), (6, 1, 6)]
)
def test_ranks_own_whole_experts_and_every_row_has_one_owner(rows, expert_rows, ranks):
    parts = owned_rows(rows, expert_rows, ranks)
    assert len(parts) == ranks
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [(part.stop - part.start) / expert_rows for part in parts]
    assert all(size == int(size) for size in sizes) and max(sizes) - min(sizes) <= 1
