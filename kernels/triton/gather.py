"""Rows from host memory to device slots: which are there already, which slots to give away, and the copies, in one
launch.

One program plans while the others wait for it; all of them copy. They are few (the copies are bound by the bus, and the
model computes beside them on the other processors), so all run at once and the wait ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meft_kernels.slots import Gathered, OwnedRows, Residency
from meft_kernels.triton.common import block
from meft_kernels.triton.select_largest import among_largest, kth_largest


@triton.jit
def _plan(
    ROWS,
    SLOT_OF_ROW,
    ROW_OF_SLOT,
    USED,
    VERSION_OF_ROW,
    VERSION_OF_SLOT,
    SLOTS,
    COPIED,
    AGES,
    VICTIMS,
    COUNTS,
    PLACE_OF_ROW,
    count,
    num_slots,
    now,
    OWNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stamp = tl.zeros((BLOCK,), tl.int32) + now
    missing, stale, free = count * 0, count * 0, count * 0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        row = tl.load(ROWS + at, mask=inside, other=0)
        slot = tl.load(SLOT_OF_ROW + row, mask=inside, other=-1)
        held = slot >= 0
        version = tl.load(VERSION_OF_ROW + row, mask=inside, other=0)
        old = held & (tl.load(VERSION_OF_SLOT + slot, mask=held, other=0) != version)
        tl.store(USED + slot, stamp, mask=held)
        tl.store(VERSION_OF_SLOT + slot, version, mask=held)
        tl.store(SLOTS + at, slot, mask=inside)
        tl.store(COPIED + at, tl.where(held & (old == 0), 0, 1), mask=inside)
        missing += tl.sum((inside & (held == 0)).to(tl.int32), 0)
        stale += tl.sum(old.to(tl.int32), 0)
    tl.debug_barrier()

    # Slots to give away: the free ones, then those that were used longest ago; none that is used now.
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < num_slots
        row = tl.load(ROW_OF_SLOT + slot, mask=inside, other=-1)
        age = tl.where(row < 0, 0x7FFFFFFF, now - tl.load(USED + slot, mask=inside, other=0))
        tl.store(AGES + slot, age, mask=inside)
        free += tl.sum((inside & (age > 0)).to(tl.int32), 0)
    tl.debug_barrier()
    given = tl.minimum(missing, free)
    threshold, ties = kth_largest(AGES, num_slots, given, BLOCK)
    victims_before, ties_before = count * 0, count * 0
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        age = tl.load(AGES + slot, mask=slot < num_slots, other=0)
        chosen, ties_before = among_largest(age, threshold, ties, ties_before)
        row = tl.load(ROW_OF_SLOT + slot, mask=chosen > 0, other=-1)
        tl.store(VICTIMS + victims_before + tl.cumsum(chosen, 0) - chosen, slot, mask=chosen > 0)
        tl.store(SLOT_OF_ROW + row, tl.full((BLOCK,), -1, tl.int32), mask=row >= 0)
        victims_before += tl.sum(chosen, 0)
    tl.debug_barrier()

    missing_before = count * 0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        slot = tl.load(SLOTS + at, mask=at < count, other=0)
        lacks = (slot < 0).to(tl.int32)
        place = missing_before + tl.cumsum(lacks, 0) - lacks
        gets = (lacks > 0) & (place < given)
        victim = tl.load(VICTIMS + place, mask=gets, other=0)
        row = tl.load(ROWS + at, mask=gets, other=0)
        tl.store(SLOTS + at, victim, mask=gets)
        tl.store(ROW_OF_SLOT + victim, row, mask=gets)
        tl.store(SLOT_OF_ROW + row, victim, mask=gets)
        tl.store(USED + victim, stamp, mask=gets)
        tl.store(VERSION_OF_SLOT + victim, tl.load(VERSION_OF_ROW + row, mask=gets, other=0), mask=gets)
        tl.store(COPIED + at, tl.zeros((BLOCK,), tl.int32), mask=(lacks > 0) & (place >= given))
        missing_before += tl.sum(lacks, 0)
    if OWNS:
        tl.debug_barrier()
        owned = count * 0
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            copied = tl.load(COPIED + at, mask=at < count, other=0) > 0
            row = tl.load(ROWS + at, mask=copied, other=0)
            here = tl.load(PLACE_OF_ROW + row, mask=copied, other=-1) >= 0
            tl.store(COPIED + at, tl.full((BLOCK,), 2, tl.int32), mask=here)
            owned += tl.sum(here.to(tl.int32), 0)
        tl.store(COUNTS + 4, owned)
    tl.store(COUNTS, count - missing - stale)
    tl.store(COUNTS + 1, missing)
    tl.store(COUNTS + 2, stale)
    tl.store(COUNTS + 3, missing - given)


@triton.jit(do_not_specialize=["now"])
def gather_kernel(
    TABLE,
    INTO,
    ROWS,
    COUNT,
    SLOT_OF_ROW,
    ROW_OF_SLOT,
    USED,
    VERSION_OF_ROW,
    VERSION_OF_SLOT,
    SLOTS,
    COPIED,
    AGES,
    VICTIMS,
    COUNTS,
    READY,
    OWNED,
    PLACE_OF_ROW,
    num_slots,
    now,
    WIDTH: tl.constexpr,
    OWNS: tl.constexpr,
    PLANS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    count = tl.load(COUNT)
    if PLANS:  # noqa: SIM102 (decided when the kernel is compiled)
        if program == 0:
            _plan(
                ROWS,
                SLOT_OF_ROW,
                ROW_OF_SLOT,
                USED,
                VERSION_OF_ROW,
                VERSION_OF_SLOT,
                SLOTS,
                COPIED,
                AGES,
                VICTIMS,
                COUNTS,
                PLACE_OF_ROW,
                count,
                num_slots,
                now,
                OWNS,
                BLOCK,
            )
            # Every thread's stores come before the release, and every thread's loads after the acquire.
            tl.debug_barrier()
            tl.atomic_xchg(READY, 1, sem="release")
    if COPIES:
        if PLANS:
            ready = tl.atomic_add(READY, 0, sem="acquire")
            while ready == 0:
                ready = tl.atomic_add(READY, 0, sem="acquire")
            tl.debug_barrier()
        for at in range(program, count, tl.num_programs(0)):
            copied = tl.load(COPIED + at)
            if copied != 0:
                row = tl.load(ROWS + at).to(tl.int64)
                slot = tl.load(SLOTS + at).to(tl.int64)
                source = TABLE + row * WIDTH
                if OWNS:  # noqa: SIM102 (decided when the kernel is compiled)
                    if copied == 2:
                        source = OWNED + tl.load(PLACE_OF_ROW + row).to(tl.int64) * WIDTH
                for start in range(0, WIDTH, BLOCK_WIDTH):
                    column = start + tl.arange(0, BLOCK_WIDTH)
                    inside = column < WIDTH
                    # Of no use to the caches: it is read this once.
                    got = tl.load(source + column, mask=inside, other=0.0, eviction_policy="evict_first")
                    tl.store(INTO + slot * WIDTH + column, got, mask=inside)


def gather(
    table: Tensor,
    into: Tensor,
    rows: Tensor,
    count: Tensor,
    residency: Residency,
    found: Gathered | None = None,
    owned: OwnedRows | None = None,
    *,
    programs: int = 16,
    fused: bool = True,
) -> Gathered:
    """As :func:`meft_kernels.slots.gather`.

    Reads 2 · d bytes over the bus for each row that is brought from the host (in bf16), writes as many; the plan reads
    24 bytes for each slot.

    Args:
        table: [r, d], in memory of the device or pinned on the host, which the device reads in place.
        rows: [U'] int32 or int64. found: where the result goes; ``None``: into new tensors.
        programs: at most as many as run at once; a few saturate the bus.
        fused: ``False``: the plan and the copies in a launch each.
    """
    device, most, num_slots = into.device, rows.shape[0], into.shape[0]
    residency.now += 1
    found = found or Gathered.room(most, device)
    ages, victims = (torch.empty(num_slots, dtype=torch.int32, device=device) for _ in range(2))
    ready = torch.zeros(1, dtype=torch.int32, device=device)
    width = table.shape[1]
    for plans, copies in [(True, True)] if fused else [(True, False), (False, True)]:
        gather_kernel[(programs if copies else 1,)](
            table,
            into,
            rows,
            count,
            residency.slot_of_row,
            residency.row_of_slot,
            residency.used,
            residency.version_of_row,
            residency.version_of_slot,
            found.slots,
            found.copied,
            ages,
            victims,
            found.counts,
            ready,
            *(owned or (into, rows)),
            num_slots,
            residency.now,
            WIDTH=width,
            OWNS=owned is not None,
            PLANS=plans,
            COPIES=copies,
            BLOCK=block(max(most, num_slots), 2048, 16),
            BLOCK_WIDTH=block(width, 4096, 16),
            num_warps=8,
        )
    return found
