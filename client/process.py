"""How the processes of a site are started, and what they find in their environment."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from typing import Final

KEPT_BYTES: Final = 1 << 30
SPINS: Final = 30_000
"""About a millisecond. The next piece of work of a network's layers comes in less."""
_SETTINGS: Final = {
    "MALLOC_TRIM_THRESHOLD_": KEPT_BYTES,
    "MALLOC_MMAP_THRESHOLD_": KEPT_BYTES,
    "GOMP_SPINCOUNT": SPINS,
}
"""glibc and libgomp read them when a process starts, so it is too late for this one."""


def set_environment() -> None:
    """Sets how processes that are started from now on keep memory, and wait for work.

    They keep blocks below 1 GiB that they have freed. Each step of training frees and asks for the same
    blocks. Those that went back to the kernel in between are cleared by it page by page, which takes up to a
    third of a step of a small network (``benchmarks/step_cost.py``). What a process holds at most grows
    little, as it is needed again at once.

    And torch's threads go to sleep a millisecond after their last piece of work. By default they keep their
    processors busy for eight, at the cost of everything else that runs there, the noise of a step included.

    Only glibc and libgomp know these settings; whoever has set one in the environment keeps theirs.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, str(value))


def forkserver(*, preload: Sequence[str] = ()) -> BaseContext:
    """Returns a multiprocessing context whose processes start from a server that has imported ``preload``.

    What the server has imported is in memory once.
    """
    set_environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context
