"""Rows that a device owns: which they are, that they are updated there, and that whoever looks finds them at home."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meft_engine.config import OffloadConfig
from meft_engine.offload import hot_rows
from meft_engine.offload.gradient_slots import GradientSlots
from meft_engine.offload.hot_rows import HotRows
from meft_engine.offload.tensor import NonFiniteRowsError, PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from meft_engine.offload.updates import StaleRowsError
from meft_engine.optim.sparse_adam import SparseCPUAdam
from meft_kernels.sparse import PickGradients, placed
from tests.late_copies import LateCopies

ROWS, WIDTH = 30, 5


class Layer:
    """A layer's tables and their optimizer, on a device that may own ``most`` rows, or on the host (``None``)."""

    def __init__(
        self,
        most: int | None,
        *,
        dtype: torch.dtype = torch.float32,
        moments: torch.dtype = torch.float32,
        in_place: bool = True,
    ) -> None:
        traffic = Traffic.by(LateCopies(in_place=in_place), OffloadConfig()) if most is not None else None
        self.keys, self.values = self.tables = [
            PartiallyOffloadedTensor(
                kind,
                ROWS,
                WIDTH,
                device=torch.device("cpu"),
                compute_dtype=dtype,
                resident=kind == "keys",
                traffic=traffic,
            )
            for kind in ("keys", "values")
        ]
        generator = torch.Generator().manual_seed(1)
        for table in self.tables:
            table.fill(torch.randn(ROWS, WIDTH, generator=generator))
        self.hot = HotRows(*self.tables, most, moments) if most is not None else None
        self.slots = GradientSlots(*self.tables, 4, self.hot) if most is not None else None
        self.optimizer = SparseCPUAdam(self.tables, lr=0.1, weight_decay=0.1, moments_dtype=moments)

    def micro_step(self, rows: Tensor, grads: list[Tensor]) -> None:
        """Hand over the gradients [n, d] of rows, of values and of keys."""
        if self.slots is not None:
            places = self.slots.places(rows, None)
            found = placed(PickGradients(torch.empty(0), torch.empty(0), *grads), places)
            rows, grads = places.rows[: int(places.count)], [found.values, found.keys]
        self.values.accumulate(rows, grads[0].clone())
        self.keys.accumulate(rows, grads[1].clone())

    def visit(self, rows: Tensor) -> Tensor:
        """[n, d]: values as the device gets them."""
        with self.values.rows_at(rows) as at:
            return at.table[at.places.long()]

    def step(self, *, applied: bool = True) -> None:
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.hot is not None:
            self.hot.after_step()

    def state(self) -> dict[str, Tensor]:
        """All that is trained, of both tables."""
        return {
            f"{table.name}/{kind}": plane.clone()
            for table in self.tables
            for kind, plane in self.optimizer.saved_planes(table).items()
        }


def drawn(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Rows around one that moves on, so that the most used ones change; and gradients."""
    generator = torch.Generator().manual_seed(seed)
    near = (torch.arange(12) + seed) % ROWS
    rows = near[torch.randperm(12, generator=generator)[:7]].sort().values
    return rows, [torch.randn(7, WIDTH, generator=generator) for _ in range(2)]


def train(layers: list[Layer], steps: range, micro_steps: int = 2) -> None:
    """The last one is the host's."""
    for step in steps:
        for micro_step in range(micro_steps):
            rows, grads = drawn(3 * step + micro_step)
            for layer in layers:
                assert torch.equal(layer.visit(rows), layers[-1].visit(rows))
                layer.micro_step(rows, grads)
        for layer in layers:
            layer.step(applied=step % 5 != 3)


@pytest.fixture
def often(monkeypatch):
    """Rows are chosen after every step."""
    monkeypatch.setattr(hot_rows, "STEPS_BETWEEN_CHOICES", 1)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "staged"])
@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("most", [1, 9, ROWS])
def test_everything_is_as_on_the_host_bit_for_bit(most, dtype, moments, in_place, often):
    device, host = (Layer(count, dtype=dtype, moments=moments, in_place=in_place) for count in (most, None))
    for start in range(0, 12, 4):
        train([device, host], range(start, start + 4))
        assert same(device, host)
        assert torch.equal(device.keys.compute_copy(), host.keys.compute_copy())
    assert device.hot.promoted > most or most == ROWS
    assert device.hot.promoted - device.hot.demoted == device.hot.rows.numel() == device.hot.rows.unique().numel()


def test_steps_are_told_while_the_rows_are_there(often):
    device, host = Layer(9), Layer(None)
    train([device, host], range(6))
    for table, plain in zip(device.tables, host.tables, strict=True):
        at_home = device.optimizer.state[table.handle]["step"]
        expected = host.optimizer.state[plain.handle]["step"]
        assert not torch.equal(at_home, expected), "the host's are old"
        rows, steps = device.hot.steps_of(table)
        assert rows.numel() == 9 and torch.equal(at_home.index_copy(0, rows, steps), expected)


def same(device: Layer, host: Layer) -> bool:
    ours, theirs = device.state(), host.state()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_most_used_rows_are_chosen_and_stay_until_others_are_clearly_ahead(often):
    layer = Layer(2)

    def use(*rows: int) -> set[int]:
        layer.micro_step(torch.tensor(rows), [torch.zeros(len(rows), WIDTH)] * 2)
        layer.step(applied=False)
        return set(layer.hot.rows.tolist())

    assert use(9, 8, 7) == {7, 8}  # of equal ones the lowest
    assert [use(7, 8) for _ in range(3)] == [{7, 8}] * 3
    # Twice 1.9 are less than 3.4 · 0.9², and 2.7 are not yet a quarter more than 3.4 · 0.9³.
    assert [use(5) for _ in range(4)] == [{7, 8}] * 3 + [{5, 7}]
    assert (layer.hot.promoted, layer.hot.demoted) == (3, 1)


def test_rows_that_are_there_cross_no_bus(often):
    layer, host = Layer(ROWS), Layer(None)
    for one in (layer, host):
        one.micro_step(torch.arange(ROWS), [torch.ones(ROWS, WIDTH)] * 2)
        one.step()
    assert layer.hot.rows.tolist() == list(range(ROWS))
    train([layer, host], range(4))
    before = crossed(layer)
    train([layer, host], range(4, 8))
    assert crossed(layer) == before
    assert layer.values.visits()[0] > 0


def crossed(layer: Layer) -> list[int]:
    layer.keys.finish_sending()
    return [t.bytes_to_device + t.bytes_of_updates + t.bytes_to_host for t in layer.tables]


READERS = {
    "master": lambda layer: layer.values.master,
    "masters": lambda layer: layer.values.masters(slice(0, ROWS)),
    "planes": lambda layer: layer.values.planes()[0],
    "gather": lambda layer: layer.values.gather(torch.arange(ROWS)),
    "current_masters": lambda layer: layer.optimizer.current_masters(layer.values),
    "state_dict": lambda layer: layer.optimizer.state_dict()["state"][1]["exp_avg"],
    "saved_planes": lambda layer: layer.optimizer.saved_planes(layer.values)["step"],
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_on_the_host_finds_what_is_on_the_device(reader, often):
    device, host = Layer(9), Layer(None)
    train([device, host], range(3))
    assert torch.equal(READERS[reader](device), READERS[reader](host))


WRITERS = {
    "fill": lambda layer: layer.values.fill(torch.ones(ROWS, WIDTH)),
    "write": lambda layer: layer.values.write(torch.tensor([1, 5, 3]), torch.ones(3, WIDTH)),
    "load_state_dict": lambda layer: layer.optimizer.load_state_dict(doubled(layer.optimizer.state_dict())),
}


def doubled(state: dict) -> dict:
    return {**state, "state": {k: {n: 2 * v for n, v in of.items()} for k, of in state["state"].items()}}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_on_the_host_holds(writer, often):
    """In the middle of a window, too, whose gradients are kept."""
    device, host = Layer(9), Layer(None)
    train([device, host], range(3))
    rows, grads = drawn(9)
    for layer in (device, host):
        layer.micro_step(rows, grads)
        WRITERS[writer](layer)
        layer.step()
    train([device, host], range(4, 7))
    assert same(device, host)


def test_a_table_that_an_update_has_damaged_can_be_filled_anew(often, monkeypatch):
    device, host = Layer(9), Layer(None)
    train([device, host], range(3))

    def fail(rows: Tensor) -> None:
        raise OSError("in the middle of an update")

    device.micro_step(*drawn(9))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="middle"):
        patch.setattr(device.keys, "refresh", fail)
        device.optimizer.step()
    device.optimizer.zero_grad()
    with pytest.raises(StaleRowsError, match="half updated"):
        device.keys.planes()
    for layer in (device, host):
        for name, plane in host.state().items():
            table, kind = name.split("/")
            if kind == "compute":
                getattr(layer, table).fill(plane)
    for table in device.tables:
        for kind, state in device.optimizer.state[table.handle].items():
            state.copy_(host.state()[f"{table.name}/{kind}"])
    train([device, host], range(4, 8))
    assert same(device, host)


def test_the_norm_counts_rows_that_are_there(often):
    device, host = Layer(9), Layer(None)
    train([device, host], range(3))
    rows, grads = drawn(9)
    for layer in (device, host):
        layer.micro_step(rows, grads)
    assert device.optimizer.gradient_norm() == pytest.approx(host.optimizer.gradient_norm(), rel=1e-12)
    here = [row for row in rows.tolist() if row in device.hot.rows.tolist()]
    assert here
    grads[0][rows.tolist().index(here[0]), 2] = torch.nan
    device.micro_step(rows, grads)
    assert math.isnan(device.optimizer.gradient_norm())
    device.optimizer.zero_grad()
    assert device.optimizer.gradient_norm() == 0.0


def test_rows_that_leave_the_range_are_noticed(often):
    layer, host = Layer(ROWS), Layer(None)
    train([layer, host], range(3))
    layer.micro_step(layer.hot.rows[:7], [torch.full((7, WIDTH), torch.inf)] * 2)
    layer.optimizer.step()
    layer.optimizer.zero_grad()
    with pytest.raises(NonFiniteRowsError, match="7 rows of keys"):
        layer.optimizer.gradient_norm()
    with pytest.raises(NonFiniteRowsError, match="7 rows of keys"):
        layer.keys.planes()
    for table in layer.tables:
        table.fill(torch.zeros(ROWS, WIDTH))
    assert layer.optimizer.gradient_norm() == 0.0


def test_rows_come_when_the_host_has_updated_them(often):
    """An update that is due runs when somebody waits for it."""
    device, host = Layer(ROWS), Layer(None)
    train([device, host], range(3))
    rows = torch.tensor([25, 26])
    for _ in range(3):
        for layer in (device, host):
            layer.micro_step(rows, [torch.ones(2, WIDTH)] * 2)
    due = {update.table: update for update in device.optimizer.updates()}

    def when_waited_for(table: PartiallyOffloadedTensor) -> Callable[[Callable[[], bool]], None]:
        return lambda condition: None if condition() else due[table].run()

    for table in device.tables:
        table.expect_update(when_waited_for(table))
    device.optimizer.update_hot_rows()
    device.step(applied=False)
    host.step()
    assert {25, 26} <= set(device.hot.rows.tolist())
    assert torch.equal(device.visit(rows), host.visit(rows))
    assert same(device, host)


def test_an_update_waits_for_rows_that_are_on_their_way_to_slots(often):
    """The host has none of them to update, for which it would wait itself; a slot must not get half of one, half of
    the other."""
    layer, (rows, grads) = Layer(ROWS), drawn(0)
    for _ in range(4):
        layer.micro_step(rows, grads)
        layer.values.expect(rows.clone())  # not what has been asked for and is there
        layer.step()
        assert torch.equal(layer.visit(rows), layer.values.masters(slice(None))[rows])
    assert layer.hot.promoted == len(rows)


def test_who_reads_rows_as_they_are_is_told_before_they_come_home(often):
    layer, host = Layer(9), Layer(None)
    train([layer, host], range(3))
    kept, high = {}, layer.values.planes()[0]

    def keep(table: PartiallyOffloadedTensor, rows: Tensor, beat: object) -> None:
        kept.update((row, table._host.high[row].clone()) for row in rows.tolist() if table is layer.values)

    here = layer.hot.rows.sort().values
    layer.micro_step(here, [torch.ones(here.numel(), WIDTH)] * 2)
    layer.optimizer.step()
    before = high.clone()
    layer.values.before_change = keep
    layer.hot.bring_home()
    assert sorted(kept) == here.tolist() and all(torch.equal(row, before[at]) for at, row in kept.items())
    assert not torch.equal(high[here], before[here])


def test_readers_before_an_update_are_told(often):
    layer, host = Layer(9), Layer(None)
    train([layer, host], range(3))
    versions = [table.version for table in layer.tables]
    here = layer.hot.rows.sort().values
    layer.micro_step(here, [torch.ones(here.numel(), WIDTH)] * 2)
    layer.optimizer.step()
    assert all(table.version > version for table, version in zip(layer.tables, versions, strict=True))


def test_bytes_are_those_of_all_that_is_allocated():
    for most, dtype, moments in itertools.product(
        (1, 9), (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16)
    ):
        hot = Layer(most, dtype=dtype, moments=moments).hot
        rows = most * 2 * (WIDTH * (4 + 4 + 2 * moments.itemsize) + 4)
        assert hot.device_bytes() == rows + most * (8 + 1 + 1) + 1 + 8 * (ROWS + 1) + 8
