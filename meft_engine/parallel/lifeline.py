"""Who tells a rank that another one is lost: a thread in every rank, beside the collectives.

Ranks meet in collectives, which wait for up to half an hour for a rank that died, and never say which one it was.
The threads form a star: every rank holds a TCP connection to rank 0 and sends its position over it with each beat;
rank 0 judges, and tells everyone. A rank that loses rank 0 judges by itself.
"""

from __future__ import annotations

import atexit
import hmac
import logging
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from meft_engine.parallel.judge import Judge
from meft_engine.parallel.wire import Peer, Place, decode, decode_place, encode

logger = logging.getLogger("meft_engine")

# What a rank that stops because another one is lost exits with: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_CODE = 75

_SILENCE = 0.7  # of the timeout, after which a rank counts as lost; the rest is for telling and for stopping


class RankLostError(RuntimeError):
    """A rank died, hangs or cannot be reached; the message names it."""


def listen() -> socket.socket:
    """A listening socket for rank 0, on a free port of every interface."""
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


class Lifeline:
    """A thread in every rank that tells all others when one of them is lost.

    Lost is a rank whose connection ends without a goodbye (it died), that gives no sign of life for 0.7 of the timeout
    (it hangs, or its host is cut off), or whose training thread stays behind for as long while others wait for it in
    the engine. Once that is known, every rank logs it, :meth:`check` raises, and a process that is still there after
    min(5 s, a fifth of the timeout) exits with ``exit_code``, since its training thread may wait in a collective for
    ever. All of this ends within the timeout. A rank in which something holds the interpreter lock for 0.7 of the
    timeout counts as one that hangs.

    An exception that ends the process is told to the others. A process that exits without one has ended well, as
    after :meth:`close`. Once rank 0 has ended well, the others notice a loss only if they wait for rank 0.

    Args:
        rank: of this process.
        names: what messages call each rank, such as "rank 2 (host n1, process 4711)".
        address: host and port of rank 0's listener.
        token: what the ranks of this job know, and nobody else.
        timeout: seconds within which the other ranks have stopped.
        listener: of rank 0: what :func:`listen` returned. It is closed with the lifeline.
        exit_code: of a process that stops because another rank is lost.

    Raises:
        RankLostError: if rank 0 cannot be reached.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        address: tuple[str, int],
        token: str,
        timeout: float,
        *,
        listener: socket.socket | None = None,
        exit_code: int = EXIT_CODE,
    ) -> None:
        assert token and exit_code != 0 and (rank != 0 or listener is not None or len(names) == 1)
        self._rank, self._names, self._token, self._exit_code = rank, list(names), token, exit_code
        self._limit, self._beat = _SILENCE * timeout, min(1.0, timeout / 8)
        self._tick, self._grace, self._nap = self._beat / 4, min(5.0, timeout / 5), timeout / 2
        self._turned_at = self._awake_since = time.monotonic()
        self._beat_at = self._look_at = self._turned_at
        self._timeout, self._stop_at, self._gone_by = timeout, math.inf, math.inf
        self._leave_at: float | None = None
        self._place = Place((), False, self._turned_at)
        self._judge = Judge(rank, self._names, self._limit, self._beat, self._age)
        self._verdict: str | None = None
        self._decided = threading.Event()
        self._farewell: dict[str, Any] | None = None  # what to say before the thread ends
        self._error_before = _last_error()
        self._peers: dict[int, Peer] = {}
        self._strangers: list[Peer] = []
        self._listener, self._wake = listener, ()
        self._thread: threading.Thread | None = None
        if len(self._names) > 1:
            with _connecting:
                self._start(address)
        elif listener is not None:
            listener.close()

    def mark(self, *position: int, inside: bool) -> None:
        """Note where the training thread is; positions grow, and are the same in all ranks at the same place.

        Args:
            inside: in the engine, where it may wait for others.
        """
        self._place = Place(position, inside, time.monotonic())

    def check(self, wait: float = 0.0) -> None:
        """Raise if a rank is lost.

        Args:
            wait: seconds to wait for that news, such as after a collective has failed.

        Raises:
            RankLostError: with the name of the rank.
        """
        if self._verdict is None and wait > 0 and self._thread is not None:
            self._decided.wait(wait)
        if self._verdict is not None:
            raise RankLostError(self._verdict)

    def close(self) -> None:
        """Tell the others that this rank ends well, and end the thread. May be called again."""
        self._leave({"kind": "bye"})

    # What other threads do

    def _start(self, address: tuple[str, int]) -> None:
        self._selector = selectors.DefaultSelector()
        if self._rank == 0:
            self._peers = {other: Peer(other, None) for other in range(1, len(self._names))}
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            try:
                connection = socket.create_connection(address, timeout=self._limit)
            except OSError as error:
                where = f"{address[0]}:{address[1]}"
                raise RankLostError(f"{self._names[0]} cannot be reached at {where} ({error})") from error
            self._peers = {0: Peer(0, connection)}
            self._selector.register(connection, selectors.EVENT_READ, self._peers[0])
            self._peers[0].send(encode("hello", rank=self._rank, token=self._token))
        self._wake = socket.socketpair()
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        atexit.register(self._at_exit)
        _lifelines.add(self)
        self._thread = threading.Thread(target=self._run, name="meft-lifeline", daemon=True)
        self._thread.start()

    def _leave(self, farewell: dict[str, Any]) -> None:
        if self._thread is None:
            return
        atexit.unregister(self._at_exit)
        self._farewell = farewell
        with suppress(OSError):  # the thread may have ended by itself
            self._wake[1].send(b"\0")
        self._thread.join(2 * self._grace + 1)
        self._thread = None

    def _at_exit(self) -> None:
        error = _last_error()
        if error is None or error is self._error_before:
            self._leave({"kind": "bye"})
            return
        text = traceback.format_exception_only(error)[-1].partition("\n")[0][:300]
        self._leave({"kind": "words", "text": text})
        if self._verdict is not None and threading.current_thread() is threading.main_thread():
            # What is torn down next may wait for the lost rank too, and no Python thread could end it any more.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(self._tick, self._gone_by - time.monotonic()))

    def _close_sockets(self) -> None:
        connections = [peer.connection for peer in [*self._peers.values(), *self._strangers]]
        for each in filter(None, [*connections, self._listener, *self._wake]):
            each.close()
        self._selector.close()

    def _forget(self) -> None:
        """In a forked child: it must not hold connections open, or the death of this process would go unnoticed."""
        if self._thread is not None:
            self._thread = self._verdict = None
            self._close_sockets()

    # The thread

    def _run(self) -> None:
        try:
            while not self._turn():
                pass
        except Exception as error:
            logger.exception("the lifeline failed")
            self._judge.lost_its_lifeline(self._rank, error, self._turned_at)
            self._announce(self._judge.verdict(math.inf), 0.0)
            self._close_sockets()
            time.sleep(self._grace)
            self._stop()
        finally:
            self._close_sockets()

    def _turn(self) -> bool:
        """Hear, judge and speak; returns whether the thread is to end."""
        events = self._selector.select(self._tick)
        now = time.monotonic()
        if now - self._turned_at > self._nap:
            # This process was stopped, perhaps with all others and their machine: no clock tells of other ranks.
            self._awake_since = now
        self._turned_at = now
        for key, _ in events:
            if isinstance(key.data, Peer):
                self._hear(key.data)
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._wake[0].recv(64)
        if self._farewell is not None and self._leave_at is None:
            self._say_farewell()
        if self._verdict is None and not self._ends_well():
            self._decide()
        if now >= self._beat_at:
            self._beat_at = now + self._beat
            self._tell(encode("beat", **self._fields()))
            for stranger in [each for each in self._strangers if self._age(each.heard_at) > self._limit]:
                self._drop(stranger)
        if now >= self._stop_at and self._farewell is None:
            self._stop()
        if self._leave_at is None:
            return False
        said = self._verdict is not None or self._ends_well()
        return now >= self._leave_at or (said and all(peer.ended_at is not None for peer in self._peers.values()))

    def _age(self, moment: float) -> float:
        """Seconds since then in which this process was awake."""
        return max(0.0, self._turned_at - max(moment, self._awake_since))

    def _fields(self) -> dict[str, Any]:
        place = self._place
        return place.fields(self._age(place.since))

    def _ends_well(self) -> bool:
        return self._farewell is not None and self._farewell["kind"] == "bye"

    def _tell(self, line: bytes) -> None:
        for peer in self._peers.values():
            peer.send(line)

    def _say_farewell(self) -> None:
        self._leave_at = self._turned_at + self._grace
        if self._verdict is not None or self._ends_well():
            self._farewell = {"kind": "bye"}
            for peer in self._peers.values():
                self._say_bye(peer)
        elif self._rank == 0:
            self._judge.failed(0, self._farewell["text"], self._turned_at)
        else:
            # It may have failed only because another rank is lost; the verdict, for which it waits, names that one.
            self._tell(encode("words", text=self._farewell["text"]))

    def _say_bye(self, peer: Peer) -> None:
        peer.send(encode("bye", **self._fields()))
        peer.finish()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(64):
                try:
                    with _connecting:
                        connection, _ = self._listener.accept()
                        self._strangers.append(Peer(None, connection))
                except BlockingIOError:
                    raise
                except OSError:  # such as too many open files; without a pause this would be tried without end
                    time.sleep(self._tick)
                    return
                self._selector.register(connection, selectors.EVENT_READ, self._strangers[-1])
                if len(self._strangers) > len(self._names) + 65:
                    self._drop(self._strangers[-1])

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        peer.connection, peer.ended_at = None, self._turned_at
        if peer in self._strangers:
            self._strangers.remove(peer)

    def _hear(self, peer: Peer) -> None:
        lines, ended = peer.receive()
        for line in lines:
            message = decode(line)
            if peer.rank is None:
                self._welcome(peer, message)
            elif message is not None:
                self._obey(peer, message)
            if peer.connection is None:
                return
        if ended:
            self._drop(peer)
            if peer.rank is not None and not self._ends_well():
                self._judge.died(peer.rank, self._turned_at)

    def _welcome(self, stranger: Peer, message: dict[str, Any] | None) -> None:
        """Find out whose connection this is, and close it if it is nobody's."""
        hello = message if message is not None and message.get("kind") == "hello" else {}
        token, rank = hello.get("token"), hello.get("rank")
        expected = self._peers.get(rank) if type(rank) is int else None
        said = token.encode(errors="replace") if isinstance(token, str) else b""
        known = hmac.compare_digest(said, self._token.encode())
        if not known or expected is None or expected.connection is not None or expected.ended_at is not None:
            self._drop(stranger)
            return
        self._peers[rank], stranger.rank = stranger, rank
        self._strangers.remove(stranger)  # after that, so that a forked child finds it in one of them
        if self._verdict is not None:
            stranger.send(encode("verdict", text=self._verdict, delay=self._limit))
        elif self._ends_well():
            self._say_bye(stranger)

    def _obey(self, peer: Peer, message: dict[str, Any]) -> None:
        peer.heard_at = self._turned_at
        peer.place = decode_place(message, self._turned_at) or peer.place
        kind, text = message.get("kind"), message.get("text")
        if kind == "bye":
            self._drop(peer)
        elif kind == "words":
            self._judge.failed(peer.rank, str(text), self._turned_at)
        elif kind == "verdict":
            delay = message.get("delay")
            self._announce(str(text), delay if type(delay) is float and 0 <= delay <= self._limit else self._limit)

    def _decide(self) -> None:
        if self._turned_at >= self._look_at:
            self._look_at = self._turned_at + self._tick
            self._judge.look(self._peers, self._place, self._turned_at)
        verdict = self._judge.verdict(self._turned_at)
        if verdict is not None:
            self._announce(verdict, self._judge.delay)

    def _announce(self, verdict: str, delay: float) -> None:
        if self._verdict is not None:
            return
        self._tell(encode("verdict", text=verdict, delay=delay))
        self._verdict = verdict
        self._stop_at = time.monotonic() + self._grace
        self._gone_by = time.monotonic() + 0.8 * (self._timeout - delay)
        self._decided.set()
        _within(self._grace / 2, lambda: logger.error("%s", verdict))
        if self._leave_at is not None:  # it waited only for this
            self._leave_at = time.monotonic() + self._tick

    def _stop(self) -> None:
        _within(self._grace / 4, _flush)
        if self._farewell is None:
            os._exit(self._exit_code)


# Weak, because nothing can be unregistered from what runs after a fork.
_lifelines: weakref.WeakSet[Lifeline] = weakref.WeakSet()
# Held while a connection is open that no lifeline has noted yet: a child forked then could not close it.
_connecting = threading.Lock()


def _forget_in_child() -> None:
    _connecting.release()
    for lifeline in list(_lifelines):
        lifeline._forget()


os.register_at_fork(before=_connecting.acquire, after_in_parent=_connecting.release, after_in_child=_forget_in_child)


def _last_error() -> BaseException | None:
    """The exception that nobody caught, once there is one."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do it, but wait no longer: a full pipe, or a lock that the training thread holds, must not hold this one up."""
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, and starts no more threads
        action()
    else:
        thread.join(seconds)


def _flush() -> None:
    handlers = [*logger.handlers, *logging.getLogger().handlers]
    for each in [*handlers, sys.stdout, sys.stderr]:
        with suppress(Exception):
            each.flush()
