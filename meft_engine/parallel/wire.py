"""What lifelines say to each other: lines of JSON over TCP, of bounded length; nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import socket
import time
from contextlib import suppress
from typing import Any, NamedTuple

_MAX_LINE = 65536  # bytes
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # scripts may have given SIGPIPE its deadly default back


class Place(NamedTuple):
    """Where a training thread is: its position, whether that is inside the engine, and since when (monotonic)."""

    position: tuple[int, ...]
    inside: bool
    since: float

    def fields(self, held: float) -> dict[str, Any]:
        """What a message says of it; clocks differ between hosts, so it tells for how many seconds it has held."""
        return {"position": [int(i) for i in self.position], "inside": bool(self.inside), "held": float(held)}

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.position))})"


class Peer:
    """Another rank, or a connection that has not proved yet whose it is (``rank`` is ``None``).

    ``ended_at`` is when it left or was lost; until then, a peer without a connection is expected to connect.
    """

    def __init__(self, rank: int | None, connection: socket.socket | None) -> None:
        self.rank, self.connection = rank, connection
        self.heard_at = time.monotonic()
        self.ended_at: float | None = None
        self.place = Place((), False, self.heard_at)
        self._inbox, self._outbox = b"", b""
        if connection is not None:
            connection.setblocking(False)
            with suppress(OSError):  # of one that is broken already
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, line: bytes) -> None:
        """Send a line now or with the next one; a connection that takes nothing loses lines, never parts of one."""
        if self.connection is None:
            return
        if len(self._outbox) < _MAX_LINE:
            self._outbox += line
        with suppress(OSError):  # what is broken is noticed when it is read
            while self._outbox:
                self._outbox = self._outbox[self.connection.send(self._outbox, _NO_SIGNAL) :]

    def receive(self) -> tuple[list[bytes], bool]:
        """The whole lines that have come, and whether the connection is at its end."""
        ended = False
        try:
            while not ended and len(self._inbox) <= _MAX_LINE:
                chunk = self.connection.recv(_MAX_LINE)
                self._inbox += chunk
                ended = not chunk
        except BlockingIOError:
            pass
        except OSError:
            ended = True
        *lines, self._inbox = self._inbox.split(b"\n")
        return lines, ended or len(self._inbox) > _MAX_LINE

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        if self.connection is not None:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)


def encode(kind: str, **fields: Any) -> bytes:
    """A message as a line."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """The message of a line; ``None`` if it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def decode_place(message: dict[str, Any], now: float) -> Place | None:
    """The place that a message tells of, ``now`` being when it came; ``None`` if it tells of none."""
    position, inside, held = message.get("position"), message.get("inside"), message.get("held")
    if not isinstance(position, list) or not all(type(i) is int for i in position) or not isinstance(inside, bool):
        return None
    if type(held) is not float or not 0 <= held < math.inf:
        return None
    return Place(tuple(position), inside, now - held)
