"""The rows' half of an optimizer step, around DeepSpeed's own half."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from meft_engine.joint_norm import JointNorm, clip_coefficient
from meft_engine.offload.hot_rows import HotRows
from meft_engine.optim.sparse_adam import RowUpdate, SparseCPUAdam, run_now
from meft_engine.optim.worker import UpdateError, UpdateWorker
from meft_engine.parallel.shared_step import SharedRows
from meft_engine.phases import phase

logger = logging.getLogger("meft_engine")


class RowStep:
    """Runs the rows' update around DeepSpeed's: ``begin`` before it, ``finish`` after it.

    Args:
        optimizer: of the rows. joint_norm: the bridge into DeepSpeed's optimizer.
        max_norm: gradient clipping, 0 for none.
        worker: updates rows while the training thread goes on; ``None``: they are updated before the step returns.
        order: names of the tables as the forward meets them.
        shared: of rows that other ranks train too; ``None``: all rows are this process's.
        hot: of each layer, rows that its device may own.
    """

    def __init__(
        self,
        optimizer: SparseCPUAdam,
        joint_norm: JointNorm,
        max_norm: float,
        worker: UpdateWorker | None,
        order: list[str],
        shared: SharedRows | None = None,
        hot: Sequence[HotRows] = (),
    ) -> None:
        self.optimizer, self.joint_norm, self.worker, self.shared = optimizer, joint_norm, worker, shared
        self._max_norm, self._hot = max_norm, hot
        # Updates that are still due when the process ends are finished, and a forgotten engine leaves no thread.
        self._closer = weakref.finalize(self, _close, worker) if worker is not None else None
        self._place = {name: index for index, name in enumerate(order)}
        self._loss_scale = 1.0

    def begin(self, param_groups: list[dict[str, Any]], loss_scale: float) -> None:
        """Take what DeepSpeed's step is about to change: lr (its scheduler moves on) and the loss scale."""
        self.drain()
        self.optimizer.follow(param_groups)
        self._loss_scale = loss_scale
        if self.shared is None:
            with phase("norm"):
                self.joint_norm.rows = self.optimizer.gradient_norm()
                self.joint_norm.before_step()
            return
        with phase("exchange"):
            self.joint_norm.rows = self.shared.gradient_norm(self.optimizer)
        with phase("norm"):
            self.joint_norm.before_step()

    def finish(self, applied: bool) -> float:
        """Update the touched rows if DeepSpeed applied its step, forget their gradients, and return the joint norm."""
        norm = self.joint_norm.result()
        if applied:
            with phase("update"):
                grad_scale = clip_coefficient(norm, self._max_norm) / self._loss_scale
                updates = self.optimizer.updates(grad_scale)
                if self.shared is not None:
                    updates = self.shared.with_publication(updates, self.optimizer)
                self._run(sorted(updates, key=lambda update: self._place[update.table.name]))
                self.optimizer.update_hot_rows(grad_scale)
        self.optimizer.zero_grad()
        for hot in self._hot:
            hot.after_step()
        return norm

    def drain(self) -> None:
        """Wait until every row is up to date.

        Raises:
            UpdateError: if the updating thread cannot get there.
        """
        if self.worker is not None:
            with phase("wait"):
                self.worker.drain()

    def bring_home(self) -> None:
        """Wait until every row is up to date on the host.

        Raises:
            UpdateError: as above.
            NonFiniteRowsError: if a device has made rows infinite or NaN that it owns.
        """
        self.drain()
        for hot in self._hot:
            hot.bring_home()

    def let_go(self) -> None:
        """Wait until every row is up to date, and leave none to a device."""
        self.drain()
        for hot in self._hot:
            hot.let_go()

    def close(self) -> None:
        """Finish the updates and end their thread."""
        if self.worker is not None:
            self._closer.detach()
            self.worker.close()

    def _run(self, updates: list[RowUpdate]) -> None:
        if self.worker is not None:
            self.worker.submit(updates)
            return
        run_now(updates)


def _close(worker: UpdateWorker) -> None:
    """Where nobody is left to catch an error."""
    try:
        worker.close()
    except UpdateError as error:
        logger.error("%s", error)
