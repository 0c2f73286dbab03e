"""Ports for servers of tests, which a connection of somebody else does not take meanwhile."""

from __future__ import annotations

import random
import socket
from typing import Final

_BELOW_THOSE_OF_CONNECTIONS: Final = range(20_000, 32_000)
"""Linux gives connections ports from 32,768 on; a server's that is chosen among those may be gone when the
server starts, or starts again."""


def free_port(*, also_next: bool = False) -> int:
    """Returns a port of this machine that nobody listens on; nor on the next one, if that is asked."""
    while True:
        port = random.SystemRandom().choice(_BELOW_THOSE_OF_CONNECTIONS)  # tests seed the other generator
        if not any(_is_taken(one) for one in range(port, port + 1 + also_next)):
            return port


def free_ports(number: int) -> list[int]:
    """Returns as many that are not the same."""
    found: set[int] = set()
    while len(found) < number:
        found.add(free_port())
    return list(found)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
