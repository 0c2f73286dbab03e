"""A process for certain: noted in a file, found again by whoever comes later, ended with its whole group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STOP_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process for certain: ids are used again, an id with its time of start is not."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Returns the identity of a running process, or None if there is none (or only its remains)."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] == "Z" else cls(pid=pid, started=int(fields[19]))

    @classmethod
    def read(cls, path: Path) -> Identity | None:
        """Returns the process that a pid file names if it still runs."""
        try:
            noted = cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return noted if cls.of(noted.pid) == noted else None

    def write(self, path: Path) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"pid": self.pid, "started": self.started}))
        os.replace(fresh, path)


def end_group(identity: Identity) -> None:
    """Ends a process and all that belong to its group, of which it must be the leader."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(identity.pid, number)
        if _is_gone(identity):
            return


def end(identity: Identity) -> None:
    """Ends one process at once, without a chance to tidy up."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(identity.pid, signal.SIGKILL)
    _is_gone(identity)


def _is_gone(identity: Identity) -> bool:
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if Identity.of(identity.pid) != identity:
            return True
        time.sleep(LOOK_SECONDS)
    return False
