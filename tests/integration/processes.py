"""Training scripts in processes of their own, with and without DeepSpeed's launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.process_groups import free_port, without_ranks

SCRIPTS = Path(__file__).parent / "scripts"


def start_jobs(
    folder: Path, process: str, jobs: list[list[str]], *, launched: bool, module: str | None = None
) -> subprocess.Popen:
    """Start one process in ``folder`` that runs scripts one after the other; its output goes to ``<process>.log``.

    Args:
        jobs: of each, the script and its arguments. launched: through DeepSpeed's launcher.
        module: what the launcher starts them with (its ``--module``).
    """
    file = folder / f"{process}.json"
    file.write_text(json.dumps(jobs))
    command, port = [sys.executable], str(free_port())
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    environment = without_ranks(environment) if launched else environment
    if launched:
        command += ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--master_port", port]
        command += ["--module", module] if module else []
    command += [str(SCRIPTS / "run_several.py"), str(file)]
    with (folder / f"{process}.log").open("w") as log:
        # In a process group of its own, so that the launcher's children can be ended with it.
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )


def wait_for(folder: Path, running: dict[str, subprocess.Popen], timeout: float = 240) -> None:
    """Wait until processes have ended well; whatever happens, none is left."""
    try:
        for process, child in running.items():
            code = child.wait(timeout=timeout)
            assert code == 0, f"{process}: {(folder / f'{process}.log').read_text()[-4000:]}"
    finally:
        for child in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
