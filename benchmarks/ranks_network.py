"""A network of this program's own, where the system allows it, and how fast its loopback is."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSIDE = "MEFT_BENCH_QUIET_NETWORK"
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def enter_quiet_network() -> bool:
    """Begin this program anew in a network namespace, whose loopback carries nothing but what is measured.

    Returns:
        whether it is in one; where the system refuses, it goes on in the network that it is in.
    """
    if os.environ.get(_INSIDE):
        _set_up_loopback()
        return True
    unshare = shutil.which("unshare")
    command = [unshare or "", "--user", "--map-root-user", "--net"]
    # Tried first, with what happens inside: after exec there is no way back.
    probe = f"import sys; sys.path.insert(0, {str(_HERE)!r}); import ranks_network; ranks_network._set_up_loopback()"
    if unshare is None or subprocess.run([*command, sys.executable, "-c", probe], capture_output=True).returncode:
        return False
    sys.stdout.flush()
    os.execve(unshare, [*command, sys.executable, *sys.argv], {**os.environ, _INSIDE: "1"})


def _set_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(control, _GET_FLAGS, request))
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))


def loopback_bandwidth(total: int, repetitions: int = 3) -> float:
    """Bytes per second of one TCP connection over loopback, with a thread at each end; the best of some tries."""
    chunk = 1 << 20
    best = 0.0
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            for _ in range(repetitions):
                start = time.perf_counter()
                thread = threading.Thread(target=_send, args=(sender, bytes(chunk), total // chunk))
                thread.start()
                buffer, left = bytearray(chunk), total // chunk * chunk
                while left:
                    left -= receiver.recv_into(buffer, min(chunk, left))
                thread.join()
                best = max(best, total / (time.perf_counter() - start))
    return best


def _send(connection: socket.socket, data: bytes, count: int) -> None:
    for _ in range(count):
        connection.sendall(data)
