"""Takes away waits, pushes and the care about memory that is used again, and says which of it the late device notices.

``python -m tests.late_mutants`` works on copies; its last line is one JSON object.
"""

from __future__ import annotations

import sys

from tests.mutation import Mutant, report

RETURN = "tests/unit/test_gradient_return.py"
STAGED = "tests/unit/test_staged_rows.py"
SLOTS = "tests/unit/test_slots.py"
GRADIENT_SLOTS = "tests/unit/test_gradient_slots.py"
HOT_ROWS = "tests/unit/test_hot_rows.py"
ENGINE = "tests/integration/test_late_device.py"

OFFLOAD = "meft_engine/offload"

MUTANTS = [
    # Gradients on their way to the host.
    Mutant(
        "the number of rows is read before it is there",
        f"{OFFLOAD}/returning.py",
        "                for copy in counted:\n                    copy.wait()\n",
        "",
        GRADIENT_SLOTS,
    ),
    Mutant(
        "gradients are added before they are there",
        f"{OFFLOAD}/returning.py",
        "            for copy in copies:\n                copy.wait()\n",
        "",
        RETURN,
    ),
    Mutant(
        "rows beyond the number are added",
        f"{OFFLOAD}/returning.py",
        "[source[:found] for source in sources]",
        "sources",
        GRADIENT_SLOTS,
    ),
    Mutant(
        "any number is under way",
        f"{OFFLOAD}/returning.py",
        "while len(self._sent) >= MOST_UNDER_WAY:",
        "while len(self._sent) >= 100:",
        RETURN,
    ),
    Mutant(
        "a sum is read before all is added",
        f"{OFFLOAD}/tensor.py",
        "        self.finish_sending()\n        return self._gradient\n",
        "        return self._gradient\n",
        RETURN,
    ),
    Mutant(
        "what slots hold is not asked for",
        f"{OFFLOAD}/tensor.py",
        "            self.before_gradient()\n",
        "            pass\n",
        GRADIENT_SLOTS,
    ),
    Mutant(
        "gradient slots are used again before their copies have ended",
        f"{OFFLOAD}/gradient_slots.py",
        "            self._tables[0].finish_sending()\n",
        "            pass\n",
        GRADIENT_SLOTS,
    ),
    Mutant(
        "the number of slots in use is changed before its copy has ended",
        f"{OFFLOAD}/gradient_slots.py",
        "self._used.clone()",
        "self._used",
        GRADIENT_SLOTS,
    ),
    # Rows on their way to the device.
    Mutant(
        "a staging buffer is used again before its copy has ended",
        f"{OFFLOAD}/staging.py",
        "            last.wait()\n",
        "            pass\n",
        STAGED,
    ),
    Mutant(
        "resident rows are put in place before they are there",
        f"{OFFLOAD}/resident.py",
        "            copy.hold_device()\n",
        "",
        STAGED,
    ),
    Mutant(
        "updated keys are not put in place",
        f"{OFFLOAD}/tensor.py",
        "                self._on_device.land()\n",
        "                pass\n",
        STAGED,
    ),
    Mutant(
        "updated rows are not sent",
        f"{OFFLOAD}/tensor.py",
        "            self._on_device.changed(rows, self._host.high)\n\n    def _follow_others",
        "            pass\n\n    def _follow_others",
        f"{STAGED} {SLOTS}",
    ),
    Mutant(
        "slots do not hear of updates",
        f"{OFFLOAD}/slots.py",
        "                held.residency.version_of_row[change if isinstance(change, slice) else change[0]] += 1\n",
        "                pass\n",
        SLOTS,
    ),
    Mutant(
        "slots hear of updates before these are there",
        f"{OFFLOAD}/slots.py",
        "                change[1].hold_device()\n",
        "                pass\n",
        SLOTS,
    ),
    Mutant(
        "slots are read before their rows are there",
        f"{OFFLOAD}/slots.py",
        "        visit.copy.hold_device()\n",
        "",
        SLOTS,
    ),
    Mutant(
        "staged rows are not put into their slots",
        f"{OFFLOAD}/slots.py",
        "                self.buffer.index_copy_(0, *visit.placing)\n",
        "                pass\n",
        SLOTS,
    ),
    Mutant(
        "rows are asked for and not waited for",
        f"{OFFLOAD}/slots.py",
        "        self._at.land()\n        self._pool",
        "        self._pool",
        SLOTS,
    ),
    Mutant(
        "new rows come while the ones before are still on their way",
        f"{OFFLOAD}/slots.py",
        "            held.land()\n            found, placing",
        "            found, placing",
        SLOTS,
    ),
    Mutant(
        "slots are lent while rows for them are still on their way",
        f"{OFFLOAD}/slots.py",
        "        self.land()\n        self.owner.leave(self)\n",
        "        self.owner.leave(self)\n",
        SLOTS,
    ),
    Mutant(
        "slots that are in use are lent",
        f"{OFFLOAD}/slots.py",
        "        self._pool.use(self._at)\n",
        "",
        SLOTS,
    ),
    Mutant(
        "lent slots seem to hold the rows of another table",
        f"{OFFLOAD}/slots.py",
        "        self.residency.slot_of_row.fill_(-1)\n        self.residency.row_of_slot.fill_(-1)\n",
        "",
        SLOTS,
    ),
    Mutant(
        "another table's visit is taken for one's own",
        f"{OFFLOAD}/slots.py",
        "            self._at = None\n\n    def _begin",
        "            pass\n\n    def _begin",
        SLOTS,
    ),
    Mutant(
        "rows of an older version are taken",
        f"{OFFLOAD}/slots.py",
        "(rows.data_ptr(), rows.numel(), version) == (self.rows.data_ptr(), self.rows.numel(), self.version)",
        "(rows.data_ptr(), rows.numel()) == (self.rows.data_ptr(), self.rows.numel())",
        SLOTS,
    ),
    Mutant(
        "a table is updated while the device reads it",
        f"{OFFLOAD}/tensor.py",
        "self.updates.writing(self._finish_reading)",
        "self.updates.writing()",
        SLOTS,
    ),
    Mutant(
        "finishing does not wait",
        f"{OFFLOAD}/slots.py",
        "            self._read.wait()\n",
        "            pass\n",
        SLOTS,
    ),
    Mutant(
        "rows that were brought to date are read before they are there",
        f"{OFFLOAD}/tensor.py",
        "        copy.hold_device()\n        return found\n",
        "        return found\n",
        f"{ENGINE}::test_rows_that_are_brought_to_date_for_each_reader",
    ),
    # Rows that the device owns.
    Mutant(
        "rows are given up and not brought home",
        f"{OFFLOAD}/hot_rows.py",
        "            self._send_home(leaving)\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "rows come to stay while the host still has to update them",
        f"{OFFLOAD}/hot_rows.py",
        "                stack.enter_context(table.reading())  # the host's updates of them come first\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "nobody knows which rows are ahead of the host's",
        f"{OFFLOAD}/hot_rows.py",
        "        self._ahead[:count] |= touched\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "gradients are lost with the rows that are given back",
        f"{OFFLOAD}/hot_rows.py",
        "            table.accumulate(self._row_of_place[touched], half.gradients[touched])\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "gradients of a window before are added to",
        f"{OFFLOAD}/hot_rows.py",
        "        self._touched.fill_(False)\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "random bits are drawn by the place of a row",
        f"{OFFLOAD}/hot_rows.py",
        "corrections, rows[places.long()].int()",
        "corrections, places",
        HOT_ROWS,
    ),
    Mutant(
        "whoever waits to read rows as they are is not told that they come home",
        f"{OFFLOAD}/tensor.py",
        "            self.about_to_change(rows)\n            yield\n",
        "            yield\n",
        HOT_ROWS,
    ),
    Mutant(
        "the host's rows are read while the device is ahead",
        f"{OFFLOAD}/tensor.py",
        "            self.hot.bring_home()\n",
        "            pass\n",
        HOT_ROWS,
    ),
    Mutant(
        "rows are written on the host that the device owns",
        f"{OFFLOAD}/tensor.py",
        "            self.hot.let_go()\n",
        "            pass\n",
        HOT_ROWS,
    ),
    Mutant(
        "slots do not hear of the device's own updates",
        f"{OFFLOAD}/slots.py",
        "            held.residency.version_of_row.index_add_(0, rows, changed.int())\n",
        "            pass\n",
        HOT_ROWS,
    ),
    Mutant(
        "resident keys do not follow the device's own updates",
        f"{OFFLOAD}/resident.py",
        "        self._put(rows, compute)\n",
        "",
        HOT_ROWS,
    ),
    Mutant(
        "the host's old rows are brought in place of the device's",
        f"{OFFLOAD}/slots.py",
        "held.residency, found, self.owned),",
        "held.residency, found),",
        HOT_ROWS,
    ),
    Mutant(
        "the host's old rows are staged in place of the device's",
        f"{OFFLOAD}/slots.py",
        "                    copy_owned(self.owned, held.buffer, rows, here, found)\n",
        "                    pass\n",
        HOT_ROWS,
    ),
    Mutant(
        "rows of the device's own are updated while they are copied to their slots",
        f"{OFFLOAD}/slots.py",
        "            held.land()\n\n    def changed_there",
        "            pass\n\n    def changed_there",
        HOT_ROWS,
    ),
]


if __name__ == "__main__":
    sys.exit(not report(MUTANTS, {}))
