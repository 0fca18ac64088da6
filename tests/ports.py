"""Ports for process groups of tests; importing this changes nothing."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
