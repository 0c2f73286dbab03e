"""Imported by a fork server after what every run needs: waits until it is told what runs need besides.

So most is imported while it is still being checked what a person has typed.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from client.preloading import is_fork_server
from common import durable

_VARIABLE: Final = "FEVERFEW_AWAITED"
_LOOK_SECONDS: Final = 0.01


def announce(path: Path) -> None:
    """Lets a fork server that is started from now on wait for a file, as long as this process lives."""
    os.environ[_VARIABLE] = f"{os.getpid()} {path}"


def tell(path: Path, *, modules: Sequence[str]) -> None:
    """Says what is to be imported besides; the server then goes on."""
    durable.replace(path, "\n".join(modules).encode("ascii"))


def _told() -> list[str]:
    starter, _, path = os.environ[_VARIABLE].partition(" ")
    while not os.path.exists(path):
        if os.getppid() != int(starter):
            os._exit(1)
        time.sleep(_LOOK_SECONDS)
    return Path(path).read_text(encoding="ascii").split()


if is_fork_server():
    for name in _told():
        importlib.import_module(name)
