"""Hosts that are namespaces of this machine: own network, name, processes, shared memory and ssh server.

They share the file system, as the nodes of a cluster share one over NFS. Everything is private to the namespaces (the
``/etc/hosts`` and the ssh keys are mounted over this machine's), so that all of it is gone with their first process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
"""The repository, from which ranks import ``tests``."""

_NETWORK = "10.83.0"
_LAUNCHER_PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_RANK", "CROSS_")
_LAUNCHER_PREFIXES += ("SLURM", "OMPI_", "PMI", "TORCHELASTIC_", "GLOO_", "PDSH_", "PYTEST_", "PYTHONPATH")

# What the first process of a host does: it mounts what is private, waits until it has a network, and becomes the ssh
# server, which also reaps what others leave behind.
_FIRST_PROCESS = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$1/hosts.$2" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
hostname "$2"
echo ready
read -r connected
exec /usr/sbin/sshd -D -f /etc/ssh/sshd_config -E "$1/sshd.$2.log"
"""

_SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

_SSH = """
Host *
    IdentityFile /etc/ssh/key
    IdentitiesOnly yes
    BatchMode yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 10
"""


def plain_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what launchers and pytest set, plus what every rank here needs."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    return {**plain, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def require(*programs: str) -> None:
    """Skip the test that calls this where namespaces cannot be made or a program is missing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs Linux and root")
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    missing = [program for program in programs if shutil.which(program, path=folders) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@dataclass(frozen=True)
class Host:
    """One host of a lab."""

    name: str
    address: str
    pid: int
    """Of its first process, as this machine counts; the host ends with it."""

    def command(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> list[str]:
        """The command line that runs ``arguments`` on this host, in ``folder`` and with exactly this environment."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--ipc", "--pid", "--mount", "--"]
        variables = [f"{name}={value}" for name, value in environment.items()]
        return [*enter, "env", "--ignore-environment", f"--chdir={folder}", *variables, *arguments]

    def start(
        self, arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a process on this host; its output goes to ``log``. It ends with the lab at the latest."""
        command = self.command(arguments, folder, plain_environment() if environment is None else environment)
        with log.open("w") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def run(self, arguments: Sequence[str], timeout: float = 30) -> str:
        """The output of a short command on this host.

        Raises:
            AssertionError: with its output, if it fails.
        """
        command = self.command(arguments, Path("/"), plain_environment())
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{self.name}: {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout


class Lab:
    """Some hosts that reach each other through a switch, which is a namespace too."""

    def __init__(self, hosts: dict[str, Host], switch: int) -> None:
        self.hosts, self._switch = hosts, switch

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def link_down(self, name: str) -> None:
        """Pull the cable of a host: nothing that is sent from or to it arrives any more."""
        self._set_link(name, "down")

    def link_up(self, name: str) -> None:
        """Plug it in again."""
        self._set_link(name, "up")

    def _set_link(self, name: str, state: str) -> None:
        _call("nsenter", f"--target={self._switch}", "--net", "ip", "link", "set", f"to-{name}", state)


@contextmanager
def start_lab(folder: Path, names: Sequence[str] = ("n1", "n2"), *, loopback_names: bool = False) -> Iterator[Lab]:
    """Hosts with these names, until the block ends.

    Args:
        folder: an empty folder for keys, settings and logs.
        loopback_names: a host's own name is 127.0.1.1 on it, as Debian's installer writes it into ``/etc/hosts``.
    """
    require("unshare", "nsenter", "setpriv", "ip", "ssh", "sshd", "ssh-keygen")
    addresses = {name: f"{_NETWORK}.{i}" for i, name in enumerate(names, start=1)}
    _write_settings(folder, addresses, loopback_names)
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces(["sh", "-c", "echo ready; exec sleep infinity"], "--net"))
        in_switch = ("nsenter", f"--target={switch.pid}", "--net", "ip")
        _call(*in_switch, "link", "add", "switch", "type", "bridge")
        _call(*in_switch, "link", "set", "switch", "up")
        hosts = {}
        for name, address in addresses.items():
            first = ["sh", "-c", _FIRST_PROCESS, "sh", str(folder), name]
            process = stack.enter_context(_namespaces(first, "--net", "--uts", "--ipc", "--mount"))
            hosts[name] = Host(name, address, process.pid)
            port = f"to-{name}"
            ends = ("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
            _call(*in_switch, *ends)
            _call(*in_switch, "link", "set", port, "master", "switch", "up")
            in_host = ("nsenter", f"--target={process.pid}", "--net", "ip")
            _call(*in_host, "address", "add", f"{address}/24", "dev", "eth0")
            _call(*in_host, "link", "set", "lo", "up")
            _call(*in_host, "link", "set", "eth0", "up")
            process.stdin.write("connected\n")
            process.stdin.flush()
        for host in hosts.values():
            _wait_for_ssh(host, folder)
        yield Lab(hosts, switch.pid)


@dataclass
class _First:
    """The first process of some namespaces."""

    pid: int
    stdin: IO[str]


@contextmanager
def _namespaces(arguments: Sequence[str], *kinds: str) -> Iterator[_First]:
    """A process in new namespaces, that of processes included: with it, every process in them ends.

    It also ends with this process, however that ends.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--pid", *kinds, "--", *arguments]
    outer = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    first = None
    try:
        line = outer.stdout.readline()
        if line != "ready\n":
            pytest.skip(f"namespaces cannot be made here: {line.strip()}")
        first = psutil.Process(outer.pid).children()[0]
        yield _First(first.pid, outer.stdin)
    finally:
        if first is None:
            outer.kill()
        else:
            # unshare reaps it and ends; killed itself, it would leave that to this machine's first process.
            first.kill()
        outer.communicate(timeout=20)


def _write_settings(folder: Path, addresses: Mapping[str, str], loopback_names: bool) -> None:
    """The hosts' private files: who is who, and a key that lets them into each other."""
    for own in addresses:
        lines = ["127.0.0.1 localhost"]
        for name, address in addresses.items():
            lines.append(f"{'127.0.1.1' if loopback_names and name == own else address} {name}")
        (folder / f"hosts.{own}").write_text("\n".join(lines) + "\n")
    ssh = folder / "ssh"
    ssh.mkdir()
    for key in ("key", "host_key"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key))
    (ssh / "sshd_config").write_text(_SSHD)
    (ssh / "ssh_config").write_text(_SSH)


def _wait_for_ssh(host: Host, folder: Path) -> None:
    """Until the host's ssh server lets one in."""
    command = host.command(["ssh", host.address, "true"], Path("/"), plain_environment())
    until = time.monotonic() + 20
    while True:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30)
        if done.returncode == 0:
            return
        log = folder / f"sshd.{host.name}.log"
        text = log.read_text() if log.exists() else ""
        assert time.monotonic() < until, f"no ssh server on {host.name}: {done.stderr}{text}"
        time.sleep(0.1)


def _call(*command: str) -> None:
    """Run a short command of this machine.

    Raises:
        AssertionError: with its output, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
