"""A Slurm over the hosts of a lab: its controller on the first one, a daemon on each."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.lab import ROOT, Host, Lab, plain_environment, require

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scontrol", "munged", "unmunge")
CPUS = 4
"""Of each node, whatever this machine has."""

# A job that is queued again starts when its former credential has expired, after two minutes if nothing is said.
_CONFIG = """
ClusterName=lab
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=8
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
"""

# The key may be read by nobody but the daemon's user.
_MUNGED = """
set -e
mkdir -p /run/munge/lib
cp "$1" /run/munge/key
chmod 400 /run/munge/key
chown -R munge:munge /run/munge
chmod 755 /run/munge /run/munge/lib
exec setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --force --num-threads=2 \\
    --key-file=/run/munge/key --socket=/run/munge/socket --pid-file=/run/munge/pid \\
    --seed-file=/run/munge/lib/seed --log-file=/run/munge/log
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; it ends with its lab."""

    lab: Lab
    folder: Path
    environment: dict[str, str]
    """Of those who submit."""

    @property
    def login(self) -> Host:
        """Where jobs are submitted from: the last host, which is not the one of rank 0."""
        return list(self.lab.hosts.values())[-1]

    def run(self, arguments: list[str], folder: Path, timeout: float = 300) -> str:
        """The output of a command on the login host, such as ``srun``.

        Raises:
            AssertionError: with its output, if it fails.
        """
        log = folder / f"{arguments[0].rpartition('/')[2]}.log"
        process = self.login.start(arguments, folder, log, self.environment)
        try:
            code = process.wait(timeout=timeout)
        finally:
            process.kill()
            process.wait()
        assert code == 0, log.read_text()[-4000:]
        return log.read_text()


def start_slurm(lab: Lab, folder: Path) -> Slurm:
    """Start it on all hosts; ``folder`` is an empty one for its files. Skips the test where a program is missing."""
    require(*PROGRAMS)
    hosts = list(lab.hosts.values())
    config, key = folder / "slurm.conf", folder / "munge.key"
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs={CPUS} State=UNKNOWN" for host in hosts]
    partition = f"PartitionName=all Nodes={','.join(lab.hosts)} Default=YES MaxTime=10 State=UP"
    head = _CONFIG.format(first=hosts[0].name, address=hosts[0].address, folder=folder, socket="/run/munge/socket")
    config.write_text("\n".join([head, *nodes, partition]) + "\n")
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    (folder / "state").mkdir()
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    environment = plain_environment(SLURM_CONF=str(config), PATH=path, PYTHONPATH=str(ROOT))

    def start(host: Host, name: str, *command: str) -> None:
        host.start(command, folder, folder / f"{name}.{host.name}.log", environment)

    for host in hosts:
        start(host, "munged", "sh", "-c", _MUNGED, "sh", str(key))
    for host in hosts:
        _wait(host, folder, environment, ["sh", "-c", "munge -S /run/munge/socket -n | unmunge -S /run/munge/socket"])
    start(hosts[0], "controller", "slurmctld", "-D")
    for host in hosts:
        start(host, "daemon", "slurmd", "-D", "-N", host.name)
    everyone_idle = f'test "$(sinfo --noheader --Node --format=%t | grep -c "^idle$")" = {len(hosts)}'
    _wait(hosts[0], folder, environment, ["sh", "-c", everyone_idle])
    return Slurm(lab, folder, environment)


def _wait(host: Host, folder: Path, environment: dict[str, str], command: list[str]) -> None:
    """Until a command ends well."""
    until = time.monotonic() + 30
    while True:
        full = host.command(command, folder, environment)
        done = subprocess.run(full, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        logs = "".join(f"\n{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < until, f"{command}: {done.stdout}{done.stderr}{logs}"
        time.sleep(0.2)
