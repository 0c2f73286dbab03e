"""How the C library deals with the large blocks of memory that a process frees."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

KEPT_BYTES: Final = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_blocks() -> bool:
    """Lets this process keep blocks below 1 GiB that it has freed; False where the C library is not glibc.

    Each step of training frees and asks for the same blocks. Those that went back to the kernel in between
    are cleared by it page by page, which takes up to a third of a step of a small network
    (``benchmarks/step_cost.py``). What a process holds at most grows little, as it is needed again at once.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, KEPT_BYTES) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
