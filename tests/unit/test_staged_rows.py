"""Rows that are gathered into buffers which the device reads meanwhile."""

from __future__ import annotations

import pytest
import torch

from meft_engine.config import OffloadConfig
from meft_engine.offload.staging import StagedRows
from meft_engine.offload.tensor import PartiallyOffloadedTensor
from meft_engine.offload.traffic import Traffic
from tests.late_copies import LateCopies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_are_the_rows_as_they_were(dtype):
    """Of tables of several widths, more and fewer rows, none included; the table changes after each call."""
    copies = LateCopies()
    staged = StagedRows(copies, pin_memory=False, huge_pages=False)
    sent = []
    for turn, count in enumerate((3, 20, 0, 7, 50, 1)):
        table = torch.randn(60, 5 + turn).to(dtype)
        rows = torch.randperm(60)[:count]
        expected = table[rows]
        found, copy = staged.bring(table, rows)
        table.fill_(torch.nan)
        assert not count or found.isnan().all()
        copy.hold_device()
        sent.append((found, expected))
    assert copies.begun == 6 and copies.ended == 4  # of the last two nobody needs the buffer yet
    assert all(torch.equal(found, expected) and found.dtype == dtype for found, expected in sent)


def test_a_buffer_waits_for_the_copy_that_reads_it_even_if_the_device_did_not():
    copies = LateCopies()
    staged = StagedRows(copies, pin_memory=False, huge_pages=False)
    table = torch.randn(9, 4)
    brought = [staged.bring(table, torch.tensor([row])) for row in range(6)]
    for _, copy in brought:
        copy.hold_device()
    assert torch.equal(torch.cat([found for found, _ in brought]), table[:6])


def test_the_test_device_notices_a_buffer_that_is_used_too_early():
    copies, host = LateCopies(), torch.ones(3)
    copies.to_device(host)
    host.zero_()
    with pytest.raises(AssertionError, match="used again before its copy had ended"):
        copies.to_device(torch.ones(3))


def test_updated_rows_are_in_the_devices_copy_before_anybody_reads_it():
    """In the order of the updates, and not before the rows' copies have ended."""
    copies = LateCopies()
    table = PartiallyOffloadedTensor(
        "keys",
        12,
        3,
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        resident=True,
        traffic=Traffic.by(copies, OffloadConfig()),
    )
    table.fill(torch.zeros(12, 3))
    high, _ = table.planes()
    for rows, value in (([1, 4], 1.0), ([4, 5], 2.0), ([11], 3.0)):
        table.expect_update(None)
        with table.writing():
            high[rows] = value
            table.refresh(torch.tensor(rows))
    expected = high.clone()
    with table.reading() as found:
        assert found.data_ptr() != high.data_ptr() and torch.equal(found, expected)
    with table.rows_at(torch.tensor([4, 11])) as at:
        assert torch.equal(at.brought()[:, 0], torch.tensor([2.0, 3.0]))
