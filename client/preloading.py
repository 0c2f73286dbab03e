"""Imported first by a fork server: nobody looks for garbage in all that has been imported so far.

There is hardly any, and to look at all of it again and again takes a sixth of the time; what was just made is
looked at as ever. Nor does Ctrl-C, which reaches it too, end it here with a page of text: who started it
decides. ``client/preloaded.py``, imported last, sets both as they were.
"""

from __future__ import annotations

import gc
import signal
import sys
from multiprocessing import forkserver
from typing import Final

USUAL: Final = gc.get_threshold()
INTERRUPT: Final = signal.getsignal(signal.SIGINT)
_NEVER: Final = 2**30


def is_fork_server() -> bool:
    """Says whether this process is one."""
    return getattr(sys.modules["__main__"], "main", None) is forkserver.main


if is_fork_server():
    gc.set_threshold(*USUAL[:2], _NEVER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
