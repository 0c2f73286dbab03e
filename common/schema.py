"""Versions of what outlives an update of the software, and what is said of a file that has another one.

An older file is brought forward where that can be done without a person; a newer one is refused, and nothing
in it is changed. Who changes the form of such a file raises its version, and adds a step to its list.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common import durable
from common.errors import SchemaError

Step = Callable[[sqlite3.Connection], None]


def require(found: object, *, newest: int, what: str) -> int:
    """Returns the schema version that a file says it has.

    Raises:
        SchemaError: it is none, or newer than this software knows.
    """
    if type(found) is not int or found < 1:
        raise SchemaError(f"Expected {what} with a schema version, found {found!r} in its place.")
    if found > newest:
        raise SchemaError(
            f"Expected {what} of schema {newest} at most, found {found}: a newer Feverfew wrote it; update "
            "this one. Nothing was changed."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one kind of SQLite file; ``PRAGMA user_version`` is its schema version.

    what: the file, in words. create: statements that make the newest tables. steps: from version 1 to 2, from
    2 to 3, and so on. unmarked: the versions of files from before versions were noted, by names of tables.
    """

    what: str
    create: str
    unmarked: Mapping[frozenset[str], int]
    steps: tuple[Step, ...] = ()

    @property
    def newest(self) -> int:
        return len(self.steps) + 1

    def prepare(self, database: sqlite3.Connection, *, path: Path) -> None:
        """Makes the tables of a new file, and brings an older one forward, whole or not at all.

        Of what is brought forward a copy stays beside the file.

        Raises:
            SchemaError: the file is of a newer version, or of something else.
        """
        if version(database) == self.newest:
            return
        names = frozenset(_table_names(database))
        if version(database) == 0 and not names:
            mark = f"PRAGMA user_version = {self.newest}"
            database.executescript(f"BEGIN IMMEDIATE; {self.create}; {mark}; COMMIT;")
            return
        what = f"{self.what} {path}"
        found = self._version(database, names)
        if not found:
            raise SchemaError(f"Expected {what}, found a file with other tables; move it away.")
        require(found, newest=self.newest, what=what)
        if found < self.newest:
            _keep_copy(database, path=path, found=found)
        self._bring_forward(database, found=found)

    def _version(self, database: sqlite3.Connection, names: frozenset[str]) -> int:
        marked = version(database)
        return marked or self.unmarked.get(names, 0)

    def _bring_forward(self, database: sqlite3.Connection, *, found: int) -> None:
        database.execute("BEGIN IMMEDIATE")
        try:
            for step in self.steps[found - 1 :]:
                step(database)
            database.execute(f"PRAGMA user_version = {self.newest}")
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


def version(database: sqlite3.Connection) -> int:
    """Returns the version that an SQLite file is marked with; 0 for none."""
    (found,) = database.execute("PRAGMA user_version").fetchone()
    return int(found)


def _table_names(database: sqlite3.Connection) -> list[str]:
    rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return [name for (name,) in rows]


def _keep_copy(database: sqlite3.Connection, *, path: Path, found: int) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    copy = path.with_name(f"{path.stem}-schema{found}-{stamp}{path.suffix}")
    fresh = copy.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(fresh)) as target:
        database.backup(target)
    os.replace(fresh, copy)
    durable.sync_directory(path.parent)
