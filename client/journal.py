"""The file under the ledger: rows of a signed hash chain in SQLite, and a second file that knows the last.

A row is on the disk (``synchronous=FULL``) before the second file names it, and that before ``transaction``
returns. So the second file is never ahead of the first, unless the first lost rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from client import unsigned_ledger
from common import chain, durable
from common.chain import GENESIS, Head
from common.errors import LedgerError
from common.keys import PrivateKey
from common.schema import Tables

COLUMNS: Final = {
    "number": "INTEGER PRIMARY KEY",
    "kind": "TEXT NOT NULL",  # charge, stored, failed or restore
    "task": "TEXT NOT NULL",
    "run": "TEXT",
    "plan_hash": "TEXT",
    "study": "TEXT",
    "server_round": "INTEGER",
    "purpose": "TEXT",
    "part": "TEXT",
    "mechanism": "TEXT",
    "noise_multiplier": "REAL",
    "sample_rate": "REAL",
    "steps": "INTEGER",
    "nominal_patients": "INTEGER",
    "code": "TEXT",
    "time": "TEXT NOT NULL",
    "previous_hash": "TEXT NOT NULL",
    "hash": "TEXT NOT NULL",
    "signature": "TEXT NOT NULL",
}
_ENTRIES = f"""CREATE TABLE IF NOT EXISTS entries (
    {", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())}, UNIQUE (kind, task))"""
_BOUNDS = """CREATE TABLE IF NOT EXISTS bounds (
    scope TEXT NOT NULL, history TEXT NOT NULL, delta REAL NOT NULL, epsilon REAL NOT NULL,
    signature TEXT NOT NULL, PRIMARY KEY (scope, history, delta))"""
_INSERT = f"INSERT INTO entries VALUES ({', '.join(f':{name}' for name in COLUMNS)})"
_SECONDS_TO_LOCK = 60
_SQLITE_HEADER_BYTES = 100
CLAIM_SUFFIX: Final = ".claim"
REMEDY: Final = (
    "look at what happened, then run feverfew-client ledger restore. Nothing is released until then."
)


@dataclass(frozen=True, kw_only=True)
class _Left:
    """What the files of a journal were like, and its last row, when this process left them sound."""

    stamp: object
    head: Head


_left: Final[dict[Path, _Left]] = {}
"""By file, of each journal that this process has verified, or has written to since."""


def known_head(path: Path, *, head: Path, key: PrivateKey) -> Head | None:
    """Returns the last row of a journal whose files are as this process left them, without opening it; None
    of any other."""
    left = _left.get(path)
    return left.head if left is not None and left.stamp == _stamp(path, head, key) else None


class Journal:
    """Rows, appended under a lock that other processes respect.

    Args:
        path: the SQLite file; made when absent.
        head: the second file; made when both are absent.
        key: signs each row.

    Raises:
        LedgerError: not a data base, or one of the two files is missing; an older one is not sound.
        SchemaError: a newer Feverfew wrote it.
    """

    def __init__(self, path: Path, *, head: Path, key: PrivateKey) -> None:
        self._path, self._head_path, self._key = path, head, key
        self._lock = path.with_suffix(".lock")
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        with durable.locked(self._lock, seconds=_SECONDS_TO_LOCK):
            if not path.exists():
                self._begin()
            self._database = self._opened()

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def select(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """Yields the rows of a query."""
        return self._database.execute(query, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keeps other processes out; all of its rows are durable at the end, or none."""
        with durable.locked(self._lock, seconds=_SECONDS_TO_LOCK):
            was_sound = self._is_as_left()
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
            head = self.head()
            former = read_head(self._head_path) if was_sound else self._remembered()
            if former is None or former.hash != head.hash:  # also where a crash has kept it from before
                self._remember(head)
            if was_sound:
                _left[self._path] = _Left(stamp=self._stamp(), head=head)

    def append(self, row: Mapping[str, object], *, number: int | None = None) -> None:
        """Adds a row; ``number`` is the next one, and greater only for the first row after a restoration."""
        last = self.head()
        content = _following(row, last, number=number or last.number + 1, key=self._key)
        self._database.execute(_INSERT, content)

    def copy(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Adds rows of another journal of this site as they are."""
        self._database.executemany(_INSERT, list(rows))

    def remember_bound(self, scope: str, history: str, delta: float, epsilon: float, signature: str) -> None:
        """Keeps an epsilon that was computed; see ``client.ledger``."""
        row = (scope, history, delta, epsilon, signature)
        self._database.execute("INSERT OR REPLACE INTO bounds VALUES (?, ?, ?, ?, ?)", row)

    def head(self) -> Head:
        """Returns the last row, as it is signed."""
        query = "SELECT number, hash, signature FROM entries ORDER BY number DESC LIMIT 1"
        row = next(self.select(query), None)
        if row is None:
            return chain.signed(0, GENESIS, key=self._key)
        return Head(number=row[0], hash=row[1], signature=row[2])

    def require_sound(self) -> None:
        """Verifies, unless both files are as this process left them after it had verified them.

        Else every task would read the whole ledger, which grows with every task. Whoever changes a file
        changes its stamp: not even its owner can set the time of the last change of its inode.

        Raises:
            LedgerError: as ``verify``.
        """
        if not self._is_as_left():
            stamp = self._stamp()
            self.verify()
            _left[self._path] = _Left(stamp=stamp, head=self.head())

    def _is_as_left(self) -> bool:
        return known_head(self._path, head=self._head_path, key=self._key) is not None

    def _stamp(self) -> object:
        return _stamp(self._path, self._head_path, self._key)

    def verify(self, *, all_signatures: bool = False) -> None:
        """Checks the chain, the signature of its last row (or of all), and that it is as long as it was.

        Raises:
            LedgerError: a row was edited, removed or reordered, or the tail was cut.
        """
        remembered = self._remembered()  # before the rows: another process may be adding one
        key = self._key.public_key()
        try:
            (checked,) = next(self.select("PRAGMA integrity_check(1)"))
            sound, problem = sound_rows(self._rows())
        except sqlite3.DatabaseError as error:
            raise self._broken(str(error)) from None
        if problem or checked != "ok":
            raise self._broken(problem or str(checked))
        for head in sound if all_signatures else sound[-1:]:
            if not head.is_signed_by(key):
                raise self._broken(f"row {head.number} not signed by this site's key")
        self._require_in_chain(remembered)

    def require_known(self, head: Head) -> None:
        """Checks a head that somebody else remembers.

        One that this site signed and that is not in the chain stops the site until it is restored. One that
        it never signed is noted for a restoration, and stops nothing.

        Raises:
            LedgerError: it is not in the chain, nor covered by a restoration.
        """
        if self._is_in_chain(head):
            return
        if not head.is_signed_by(self._key.public_key()):
            durable.write(self._head_path.with_suffix(CLAIM_SUFFIX), _head_text(head))
            raise LedgerError(
                f"Expected row {head.number} that the coordinator remembers of this site in {self._path}, "
                "found neither it nor this site's signature; if the site was set up again without its "
                f"ledger, {REMEDY}"
            )
        with durable.locked(self._lock, seconds=_SECONDS_TO_LOCK):
            self._remember(head)
        self._require_in_chain(head)

    def _require_in_chain(self, head: Head) -> None:
        if self._is_in_chain(head):
            return
        raise self._broken(
            f"no row {head.number} as it was once written: rows at the end were lost, or this is an old copy"
        )

    def _is_in_chain(self, head: Head) -> bool:
        """A restoration covers what it was made for: the numbers that it left out, and the heads it names."""
        if head.number == 0:
            return True
        row = next(self.select("SELECT hash FROM entries WHERE number = ?", head.number), None)
        if row is not None and row[0] == head.hash:
            return True
        later = "SELECT 1 FROM entries WHERE number > ? LIMIT 1"
        if row is None and next(self.select(later, head.number), None) is not None:
            return True  # in a gap: verify lets only restorations make one
        covers = self.select("SELECT code FROM entries WHERE kind = 'restore'")
        return any(head.hash in json.loads(code) for (code,) in covers)

    def _rows(self) -> Iterator[dict[str, Any]]:
        cursor = self._database.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY number")
        return (dict(zip(COLUMNS, values, strict=True)) for values in cursor)

    def _begin(self) -> None:
        """The second file comes first, so that its absence beside rows always means a loss."""
        if self._head_path.exists():
            if self._remembered().number > 0:
                raise self._broken("no such file, though there was one")
            return
        self._remember(chain.signed(0, GENESIS, key=self._key))

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, timeout=_SECONDS_TO_LOCK)
        try:
            database.execute(f"PRAGMA synchronous={durable.synchronous()}")
            self._tables.prepare(database, path=self._path)
        except BaseException as error:
            database.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise self._broken(str(error)) from None
            raise
        return database

    @property
    def _tables(self) -> Tables:
        return Tables(
            what="the ledger",
            create=f"{_ENTRIES}; {_BOUNDS}",
            unmarked={unsigned_ledger.TABLES: 1, frozenset(("entries", "bounds")): 2},
            steps=(self._sign_rows,),
        )

    def _sign_rows(self, database: sqlite3.Connection) -> None:
        """From schema 1 to 2: every charge and outcome becomes a signed row.

        The second file comes first: if this is cut off, the rows that are made the next time have the same
        hashes. It also tells that an old copy was put in the place of a ledger that was brought forward.
        """
        if problem := unsigned_ledger.problem(database):
            raise self._broken(problem)
        rows, last = [], chain.signed(0, GENESIS, key=self._key)
        for row in unsigned_ledger.rows(database):
            content = _following(row, last, number=last.number + 1, key=self._key)
            last = Head(number=last.number + 1, hash=content["hash"], signature=content["signature"])
            rows.append(content)
        if not self._head_path.exists():
            self._remember(last)
        elif self._remembered().hash != last.hash:
            raise self._broken("an old copy, from before rows were signed")
        for table in sorted(unsigned_ledger.TABLES):
            database.execute(f"DROP TABLE {table}")
        for statement in (_ENTRIES, _BOUNDS):
            database.execute(statement)
        database.executemany(_INSERT, rows)

    def _remembered(self) -> Head:
        head = read_head(self._head_path)
        if head is None or not head.is_signed_by(self._key.public_key()):
            raise self._broken(f"no {self._head_path.name} signed by this site's key beside it")
        return head

    def _remember(self, head: Head) -> None:
        durable.rewrite(self._head_path, _head_text(head))

    def _broken(self, found: str) -> LedgerError:
        return LedgerError(f"Expected an unbroken ledger in {self._path}, found {found}; {REMEDY}")


def _following(row: Mapping[str, object], last: Head, *, number: int, key: PrivateKey) -> dict[str, Any]:
    """Returns all columns of the row that follows the last one."""
    content = dict.fromkeys(COLUMNS) | dict(row) | {"number": number, "previous_hash": last.hash}
    del content["hash"], content["signature"]
    head = chain.signed(number, chain.link(last.hash, content), key=key)
    return content | {"hash": head.hash, "signature": head.signature}


def _stamp(path: Path, head: Path, key: PrivateKey) -> object:
    """Returns what any writing to the files changes: SQLite counts in its header, others change times."""
    with path.open("rb") as file:
        header = file.read(_SQLITE_HEADER_BYTES)
    return header, _times(path), _times(head), key.public_key().public_numbers()


def _times(path: Path) -> tuple[int, ...]:
    if not path.exists():
        return ()
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _head_text(head: Head) -> bytes:
    return json.dumps(asdict(head)).encode()


def read_head(path: Path) -> Head | None:
    """Returns what the second file says; None where it is missing or not such a file."""
    try:
        tree = json.loads(path.read_text(encoding="ascii"))
        return Head(number=int(tree["number"]), hash=str(tree["hash"]), signature=str(tree["signature"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sound_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Head], str]:
    """Walks a chain; returns the heads of its rows up to the first that does not fit, and what is wrong."""
    sound: list[Head] = []
    last = Head(number=0, hash=GENESIS, signature="")
    for row in rows:
        content = {name: value for name, value in row.items() if name not in ("hash", "signature")}
        head = Head(number=row["number"], hash=row["hash"], signature=row["signature"])
        follows = head.number == last.number + 1 or (row["kind"] == "restore" and head.number > last.number)
        if not follows or row["previous_hash"] != last.hash or head.hash != chain.link(last.hash, content):
            return sound, f"row {head.number} changed, or a row before it missing"
        sound.append(head)
        last = head
    return sound, ""
