"""The deny list: keys that are not let in any more, whatever their certificates say."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from common import durable
from common.errors import StateError

FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
HEADER: Final = (
    "# Keys that the gateway refuses: fingerprint, site, why, when. feverfew-server revoke adds to it.\n"
)


class Denied:
    """The deny list as it is now: read again whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: frozenset[str] = frozenset()

    def __contains__(self, fingerprint: str) -> bool:
        """Says whether a key is denied.

        Raises:
            StateError: the list is missing or damaged, so that nobody can be let in.
        """
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                self._keys = denied(self._path)
                self._stamp = stamp
        except OSError as error:
            raise _damaged(self._path, str(error.strerror)) from None
        return fingerprint in self._keys


def denied(path: Path) -> frozenset[str]:
    """Returns the fingerprints in a deny list.

    Raises:
        StateError: a line is no line of a deny list.
    """
    found = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        fingerprint = line.split()[0]
        if not FINGERPRINT.fullmatch(fingerprint):
            raise _damaged(path, f"the line {line[:60]!a}")
        found.add(fingerprint)
    return frozenset(found)


def deny(path: Path, fingerprints: Iterable[str], *, site: str, why: str) -> None:
    """Adds keys of a site to a deny list; on disk when this returns."""
    known = denied(path)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fresh = [f"{one} {site} {why} {when}\n" for one in fingerprints if one not in known]
    durable.write(path, (path.read_text(encoding="utf-8") + "".join(fresh)).encode())


def _damaged(path: Path, found: str) -> StateError:
    return StateError(
        f"Expected the deny list {path} with a fingerprint in each line, found {found}; put its backup back. "
        "Until then nobody is let in."
    )
