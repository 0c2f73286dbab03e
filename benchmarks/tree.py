"""A command with all processes that it starts: its wall time, and the peak of their memory together.

The memory is the proportional set size (PSS): a page that several processes share counts once. It is looked
at a few times a second, so a peak of some milliseconds is missed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
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
    """Wall time, peak PSS of all processes, and how many they were then.

    ``is_whole``: whether the command came to its end; else it was ended when its time was over.
    """

    seconds: float
    megabytes: float
    processes: int
    is_whole: bool = True


def measured(
    command: Sequence[str],
    *,
    cwd: Path,
    more: Mapping[str, str] | None = None,
    at_most_seconds: float | None = None,
) -> Cost:
    """Runs a command to its end, or with all processes that it started to the end of its time.

    Args:
        more: environment variables beside those of this process.
        at_most_seconds: its time; None for as long as it takes.

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
    is_whole = True
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=at_most_seconds,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
    except subprocess.TimeoutExpired:
        is_whole = False
    finally:
        seconds = time.monotonic() - begun
        over.set()
        watcher.join()
        _end(token)
    megabytes, processes = max(peaks)
    return Cost(seconds=seconds, megabytes=megabytes, processes=processes, is_whole=is_whole)


def _end(token: str) -> None:
    """Ends what is left of a command, however often it starts another process."""
    while found := _marked(token):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.1)


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
