"""Runs of a sweep as a job array of Slurm, through submitit; a run that has to make room saves and is queued again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import DataError
from launcher import HERE
from sweep_file import Resources
from sweep_run import INTERRUPTED, RUNNING, WAITING, Limits, Nodes, Status, Stop, execute, read_status, write_status

FOLDER = "slurm"
"""Where submitit keeps its files, in the sweep's folder."""


@dataclass(frozen=True)
class Job:
    """What submitit runs on a node, with a run's folder as its argument."""

    resources: Resources
    limits: Limits

    def __call__(self, folder: str) -> str:
        """Run it; told by SIGUSR1 or SIGUSR2 to make room, it is queued again once its checkpoint is there.

        SIGTERM comes where Slurm has decided already what becomes of the job (``scontrol requeue``, preemption,
        ``scancel``): the run saves and ends.
        """
        import submitit

        # submitit has set handlers. Its own requeues a job at once, without time to save; it is called afterwards.
        requeue = next(h for n in (signal.SIGUSR2, signal.SIGUSR1) if callable(h := signal.getsignal(n)))
        stop = Stop()
        stop.listen(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        job = submitit.JobEnvironment()
        nodes = Nodes(tuple(job.hostnames), job.global_rank, job.job_id)
        status = execute(Path(folder), self.resources, self.limits, stop, nodes)
        if status.state == INTERRUPTED and stop.received and signal.SIGTERM not in stop.received:
            requeue(stop.received[0], None)
        return status.state

    def checkpoint(self, folder: str) -> Any:
        """What is to run when the job starts again: the same, which goes on from the newest checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, folder)


def parameters(resources: Resources, name: str) -> dict[str, Any]:
    """What ``submitit.SlurmExecutor`` is told; it quotes values of ``#SBATCH`` lines, and ``setup`` is quoted here."""
    slurm = resources.slurm
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {
        "job_name": name,
        "partition": slurm.partition,
        "time": slurm.minutes,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "exclusive": slurm.exclusive or None,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": resources.gpus or None,
        "array_parallelism": slurm.parallel,
        "signal_delay_s": slurm.signal_seconds,
        "additional_parameters": {"requeue": True},
        "setup": [f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}"],
    }
    return {key: value for key, value in values.items() if value is not None}


def submit(folders: Sequence[Path], output: Path, resources: Resources, limits: Limits, name: str) -> list[Status]:
    """Submit runs as one array, and note in their folders which job each is.

    Raises:
        DataError: if Slurm is not there, or refuses them.
    """
    import submitit

    if "%" in str(output):
        raise DataError(f"--output = {str(output)!r} holds a %, which Slurm replaces in names; take another folder")
    try:
        executor = submitit.SlurmExecutor(output / FOLDER, max_num_timeout=resources.slurm.requeues)
        executor.update_parameters(**parameters(resources, name))
        jobs = executor.map_array(Job(resources, limits), [str(folder) for folder in folders])
    except (RuntimeError, OSError, subprocess.SubprocessError, submitit.core.utils.FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the runs could not be submitted ({reason}); see whether sbatch works here, and what resources.slurm asks"
        ) from None
    statuses = []
    for folder, job in zip(folders, jobs, strict=True):
        now = read_status(folder)
        if now.state != RUNNING or now.job != job.job_id:  # else it has begun meanwhile, and says so itself
            now = write_status(folder, replace(now, state=WAITING, job=job.job_id, reason=""))
        statuses.append(now)
    return statuses


def alive() -> set[str] | None:
    """Names of this user's jobs that Slurm has not ended; ``None`` if it does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(done.stdout.split()) if done.returncode == 0 else None
