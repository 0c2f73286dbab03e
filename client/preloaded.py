"""Imported last by a fork server, the process from which others are forked: they begin in little memory.

What it has imported by then stays shared with them. Who looks for garbage writes into each object, and a page
that is written into is in memory once more; so nobody looks at these again.

Importing has also touched most pages of large libraries, and a process has in its memory what it touched. A
child has not, though it can do the same: so the server goes on as a child. The process that was started, and
that is known by its number, becomes a small one that waits for it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Final

from client.preloading import INTERRUPT, USUAL, is_fork_server

_WAIT: Final = "import os, sys; os.waitpid(int(sys.argv[1]), 0)"


def go_on_as_a_child() -> None:
    """Returns in a new child; this process waits for its end and ends."""
    child = os.fork()
    if child == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the server decides
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _WAIT, str(child)])


if is_fork_server():
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)
    go_on_as_a_child()
    signal.signal(signal.SIGINT, INTERRUPT)  # what a process begins with
