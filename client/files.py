"""Files of a site: read with a code for what is wrong, written whole and for the site's account only."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from common import durable
from common.errors import UnusableCase

MAX_BYTES = 2**31
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the case's
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)

Stamp = tuple[int, int, int]


def stamp(path: Path | str) -> Stamp:
    """Returns size, mtime_ns, ctime_ns of a regular file: as long as they stay, its content stays.

    Raises:
        UnusableCase: ``missing_file``, ``not_readable`` or ``too_large``.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unusable(error) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnusableCase("missing_file", "Expected a regular file, found something else.")
    if status.st_size > MAX_BYTES:
        raise UnusableCase("too_large", f"Expected at most {MAX_BYTES} bytes, found {status.st_size}.")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load(path: Path) -> bytes:
    """Returns the content of a regular file.

    Raises:
        UnusableCase: ``missing_file``, ``not_readable`` or ``too_large``.
    """
    stamp(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(error) from None


def listed(directory: Path) -> list[Path]:
    """Returns what is in a directory.

    Raises:
        UnusableCase: ``missing_file`` or ``not_readable``.
    """
    try:
        return list(directory.iterdir())
    except OSError as error:
        raise _unusable(error) from None


def walk(root: Path) -> Iterator[Path]:
    """Yields all regular files below a folder, through links to folders too, though never round in circles.

    A folder that cannot be read has no files.
    """
    yield from _walked(root, above=frozenset())


def _walked(folder: Path, *, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError:
        return
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walked(entry, above=above | {place})
        elif entry.is_file():
            yield entry


def _unusable(error: OSError) -> Exception:
    if error.errno in EXHAUSTED:
        return error
    return UnusableCase("missing_file" if error.errno in ABSENT else "not_readable", str(error))


def private_directory(path: Path) -> Path:
    """Makes the directory, and takes away what others may do in it (mode 0700)."""
    if not path.is_dir():  # to ask costs a tenth of making one that is there, which waits for its parent
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def write_private(path: Path, *, content: bytes) -> None:
    """Replaces a file (mode 0600) in a private directory; readers see the old or the new content."""
    private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        durable.sync(stream.fileno())
    os.replace(temporary, path)
