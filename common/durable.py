"""Files that are there whole or not at all, whatever is killed when."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all (fsync, rename, fsync)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk has no room for remains
        raise
    sync_directory(path.parent)


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


def sync_directory(directory: Path) -> None:
    """Makes durable which files a directory has."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
