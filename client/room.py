"""How much room the preprocessed cases may take: older stores make way for the one that is wanted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import Refusal

GIGABYTE = 10**9


def make(cache: Path, *, wanted: Path, needed_bytes: int, most_gigabytes: float) -> None:
    """Removes stores, the one longest unused first, until the wanted one fits; a store in use stays.

    While a store is made anew, its old form stands beside it for as long.

    Args:
        cache: the folder of all stores.
        wanted: the store that is about to be opened; it need not be there yet.
        needed_bytes: what it takes.

    Raises:
        Refusal: ``cache_too_small``: it does not fit, whatever else is removed.
    """
    most = most_gigabytes * GIGABYTE
    if needed_bytes > most:
        raise Refusal(
            "cache_too_small",
            f"Expected room for {needed_bytes / GIGABYTE:.1f} GB of preprocessed cases, found "
            f"max_cache_gigabytes: {most_gigabytes:g} in site.yaml; raise it.",
        )
    others = sorted((path for path in cache.iterdir() if path.is_dir() and path != wanted), key=_last_used)
    taken = {path: _size(path) for path in others}
    for path in others:
        if needed_bytes + sum(taken.values()) <= most:
            return
        if _removed(path):
            del taken[path]


def note_use(store: Path) -> None:
    """Makes a store the one that was used last."""
    index = store / "index.json"
    if index.exists():
        os.utime(index)


def _last_used(store: Path) -> int:
    index = store / "index.json"
    return index.stat().st_mtime_ns if index.exists() else 0


def _size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.iterdir() if path.is_file())


def _removed(store: Path) -> bool:
    try:
        with FileLock(store / "lock", timeout=0, mode=0o600):
            shutil.rmtree(store)  # whoever has it mapped keeps it
    except Timeout:
        return False
    return True
