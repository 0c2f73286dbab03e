"""The first form of the ledger (schema 1), read to be brought forward: charges in one table, chained and not
signed, and how they ended in another. Nothing writes it any more."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from common import chain
from common.chain import GENESIS

TABLES: Final = frozenset(("charges", "outcomes", "bounds"))
Row = dict[str, Any]


def is_in(database: sqlite3.Connection) -> bool:
    """Says whether a data base is such a ledger, perhaps a damaged one."""
    query = "SELECT name FROM sqlite_master WHERE name IN ('charges', 'entries')"
    return database.execute(query).fetchall() == [("charges",)]


def rows(database: sqlite3.Connection) -> Iterator[Row]:
    """Yields every charge, each followed by its outcome if it has one, as rows of today's ledger.

    Numbers, hashes and signatures are left out: they are made anew.
    """
    ended = {task: (kind, code, time) for task, kind, code, time in _select(database, "outcomes")}
    for charge in _charges(database):
        task = charge["task"]
        yield {
            name: value for name, value in charge.items() if name not in ("number", "hash", "previous_hash")
        } | {"kind": "charge"}
        if task in ended:
            kind, code, time = ended[task]
            yield {"kind": kind, "task": task, "code": code, "time": time}


def problem(database: sqlite3.Connection) -> str:
    """Returns what is wrong with the chain of charges, or with the outcomes; "" if nothing is."""
    previous, tasks = GENESIS, set()
    for expected, row in enumerate(_charges(database), start=1):
        number, recorded, before = row.pop("number"), row.pop("hash"), row.pop("previous_hash")
        if number != expected or before != previous or recorded != chain.link(previous, row):
            return f"charge {number} changed, or a charge before it missing"
        previous = recorded
        tasks.add(row["task"])
    if any(task not in tasks for task, *_ in _select(database, "outcomes")):
        return "the outcome of a charge that is missing"
    return ""


def _charges(database: sqlite3.Connection) -> Iterator[Row]:
    cursor = database.execute("SELECT * FROM charges ORDER BY number")
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, values, strict=True)) for values in cursor)


def _select(database: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    return database.execute(f"SELECT * FROM {table}").fetchall()
