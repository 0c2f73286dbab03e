"""Files that are there whole or not at all, whatever is killed when."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_LOOK_SECONDS = 0.01
_waits = ContextVar("waits", default=True)


@contextmanager
def waiting(waits: bool) -> Iterator[None]:
    """Says whether what is written within waits for the disk, as it does unless somebody says otherwise.

    Without, it is whole or not there whatever is killed, but may be lost or empty where the power fails.
    """
    token = _waits.set(waits)
    try:
        yield
    finally:
        _waits.reset(token)


def sync(descriptor: int) -> None:
    """Waits until the disk has an open file."""
    if _waits.get():
        os.fsync(descriptor)


def synchronous() -> str:
    """Returns how SQLite is to wait: its ``PRAGMA synchronous``."""
    return "FULL" if _waits.get() else "OFF"


def write(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all (fsync, rename, fsync)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        move(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk has no room for remains
        raise


def rewrite(path: Path, data: bytes) -> None:
    """Writes a file as ``write`` does, over the one before the last, which stays beside it: ``.NAME.spare``.

    For a small file that is written in every task. What takes the place of another file is sent to the disk
    by some file systems while it is new, though nobody waits for it; and nothing is deleted (decision 030).
    """
    spare, former = spare_of(path), path.with_name(f".{path.name}.former")
    write_over(spare, data, mode=0o600)
    try:
        os.link(path, former)
    except FileExistsError:  # of a process that was killed before it had renamed it
        former.unlink()
        os.link(path, former)
    except OSError:  # the first one, or a file system without a second name for a file
        return move(spare, path)
    os.replace(spare, path)
    os.replace(former, spare)
    sync_directory(path.parent)


def spare_of(path: Path) -> Path:
    """Returns what ``rewrite`` leaves beside a file."""
    return path.with_name(f".{path.name}.spare")


def write_over(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Writes a file that nobody reads now, on the same place of the disk, and waits for it; makes it where
    there is none, and anew where it has another name as well: that may be somebody's copy of an earlier day.
    """
    if path.exists() and path.stat().st_nlink > 1:
        path.unlink()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, mode), "wb") as file:
        file.write(data)
        file.truncate()
        file.flush()
        sync(file.fileno())


def move(path: Path, to: Path) -> None:
    """Gives a file that the disk has the name of another in its directory, or as a new one."""
    os.replace(path, to)
    sync_directory(to.parent)


def replace(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a killed process, leaves it whole or as it was.

    Where the power fails soon after it may be gone or empty: only for what is made again then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, *, seconds: float | None = None) -> Iterator[int]:
    """Opens a file to read and to append, made at the first use, and keeps out whoever locks it too.

    Yields its descriptor. A killed process lets go.

    Raises:
        TimeoutError: another process has had it for so long; without a number it is waited for without end.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if seconds is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            _lock_within(descriptor, seconds=seconds, path=path)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_within(descriptor: int, *, seconds: float, path: Path) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError(f"Expected {path} to be let go within {seconds:g} s.") from None
        time.sleep(_LOOK_SECONDS)


def sync_directory(directory: Path) -> None:
    """Makes durable which files a directory has."""
    if not _waits.get():
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)
