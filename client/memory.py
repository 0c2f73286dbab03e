"""What the processes of a site have in common of memory, and how they keep what they free."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from typing import Final

KEPT_BYTES: Final = 1 << 30
_SETTINGS: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")  # glibc reads them at the start


def keep_freed_blocks() -> None:
    """Lets processes that are started from now on keep blocks below 1 GiB that they have freed.

    Each step of training frees and asks for the same blocks. Those that went back to the kernel in between
    are cleared by it page by page, which takes up to a third of a step of a small network
    (``benchmarks/step_cost.py``). What a process holds at most grows little, as it is needed again at once.
    Only glibc knows these settings; whoever has set one in the environment keeps theirs.
    """
    for name in _SETTINGS:
        os.environ.setdefault(name, str(KEPT_BYTES))


def forkserver(*, preload: Sequence[str] = ()) -> BaseContext:
    """Returns a multiprocessing context whose processes start from a server that has imported ``preload``.

    What the server has imported is in memory once.
    """
    keep_freed_blocks()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context
