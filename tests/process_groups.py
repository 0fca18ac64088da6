"""Ports, and environments without ranks, for process groups of tests; importing this changes nothing."""

from __future__ import annotations

import socket
from collections.abc import Mapping

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what makes a process a rank: a group that other tests have set up is none of a launcher's."""
    return {name: value for name, value in environment.items() if name not in _OF_A_RANK}
