"""The SuperLink's data base: looked at before it is opened, and set aside when it is damaged.

Nothing of ours is lost with it: sites are recorded in ``sites``, runs in their directories, and both are made
known to an empty one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

SUFFIXES = ("", "-wal", "-shm", "-journal")


def set_aside_if_damaged(path: Path) -> Path | None:
    """Moves a damaged data base away; returns where to, or None where there is nothing to do."""
    if not path.exists() or _is_whole(path):
        return None
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    for suffix in SUFFIXES:
        part = path.with_name(path.name + suffix)
        if part.exists():
            os.replace(part, aside.with_name(aside.name + suffix))
    return aside


def _is_whole(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False
