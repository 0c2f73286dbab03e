"""How much room the preprocessed cases may take: older stores make way for the one that is wanted."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import Refusal

GIGABYTE = 10**9

logger = logging.getLogger("feverfew.site")


def require(public_bytes: float, *, most_gigabytes: float) -> None:
    """Checks what a plan would need by public numbers; the answer leaves the site.

    Raises:
        Refusal: ``cache_too_small``.
    """
    if public_bytes > most_gigabytes * GIGABYTE:
        raise Refusal(
            "cache_too_small",
            f"Expected room for {public_bytes / GIGABYTE:.1f} GB of preprocessed cases (nominal_patients and "
            f"nominal_cases_per_patient), found max_cache_gigabytes: {most_gigabytes:g} in site.yaml; "
            "raise it.",
        )


def make(cache: Path, *, wanted: Path, needed_bytes: int, most_gigabytes: float) -> bool:
    """Removes stores, the one longest unused first, until the wanted one fits; a store in use stays.

    Whether it fits in the end depends on the true number of cases, so nobody is refused for it: the wanted
    store is made in any case, and ``check`` and the log say that the limit is too low.

    Args:
        cache: the folder of all stores.
        wanted: the store that is about to be opened; it need not be there yet.
        needed_bytes: what it takes; while it is made anew, with its old form beside it.

    Returns:
        Whether it fits.
    """
    most = most_gigabytes * GIGABYTE
    others = sorted((path for path in cache.iterdir() if path.is_dir() and path != wanted), key=_last_used)
    taken = {path: _size(path) for path in others}
    for path in others:
        if needed_bytes + sum(taken.values()) <= most:
            return True
        if _removed(path):
            del taken[path]
    return needed_bytes + sum(taken.values()) <= most


def lock(store: Path) -> Path:
    """Returns the lock of a store; it lies beside it, since whoever waits for it must outlive the store."""
    return store.with_name(f"{store.name}.lock")


def note_use(store: Path) -> None:
    """Makes a store the one that was used last."""
    index = store / "index.json"
    if index.exists():
        os.utime(index)


def _last_used(store: Path) -> int:
    try:
        return (store / "index.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(store: Path) -> int:
    total = 0
    for path in store.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process has just removed it
            continue
    return total


def _removed(store: Path) -> bool:
    try:
        with FileLock(lock(store), timeout=0, mode=0o600):
            shutil.rmtree(store, ignore_errors=True)  # whoever has it mapped keeps it
    except Timeout:
        return False
    return not store.exists()
