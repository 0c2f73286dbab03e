"""A command with all processes that it starts: its wall time, and the peak of their memory together.

The memory is the proportional set size (PSS): a page that several processes share counts once. It is looked
at a few times a second, so a peak of some milliseconds is missed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.3
_MARK = "FEVERFEW_BENCHMARK"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall time, peak PSS of all processes, and how many they were then."""

    seconds: float
    megabytes: float
    processes: int


def measured(command: Sequence[str], *, cwd: Path, more: Mapping[str, str] | None = None) -> Cost:
    """Runs a command to its end.

    Args:
        more: environment variables beside those of this process.

    Raises:
        SystemExit: the command failed; its standard error.
    """
    token = secrets.token_hex(8)
    environment = {**os.environ, **(more or {}), _MARK: token}
    over = threading.Event()
    peaks: list[tuple[float, int]] = [(0.0, 0)]

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            sizes = [_megabytes(process) for process in _marked(token)]
            peaks.append((sum(sizes), len(sizes)))

    watcher = threading.Thread(target=look)
    begun = time.monotonic()
    watcher.start()
    try:
        done = subprocess.run(
            list(command), cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - begun
    finally:
        over.set()
        watcher.join()
    if done.returncode:
        raise SystemExit(done.stderr)
    megabytes, processes = max(peaks)
    return Cost(seconds=seconds, megabytes=megabytes, processes=processes)


def _marked(token: str) -> list[Path]:
    """Returns the processes that inherited our mark, whoever their parent is by now."""
    wanted, found = f"{_MARK}={token}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes():
                found.append(process)
        except OSError:  # it has ended, or is not ours
            continue
    return found


def _megabytes(process: Path) -> float:
    try:
        text = (process / "smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)
