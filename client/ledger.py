"""The durable privacy ledger of one site: append only, charged before any release.

SQLite with ``synchronous=FULL``: when ``charge`` returns, the charge is on the disk. Rows are chained by
hash, so an edited or missing row is found when the ledger is opened. One ledger per site, whatever the
run, plan or study; epsilon is always cumulative over all of it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from common.errors import Refusal, StateError
from common.plan import canonical_json
from common.privacy import Epsilon, Spend, epsilon, merged, worst_epsilon

_GENESIS = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    number INTEGER PRIMARY KEY, task TEXT NOT NULL UNIQUE, run TEXT NOT NULL, plan_hash TEXT NOT NULL,
    study TEXT NOT NULL, server_round INTEGER NOT NULL, purpose TEXT NOT NULL, part TEXT NOT NULL,
    mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL, nominal_patients INTEGER NOT NULL, time TEXT NOT NULL,
    previous_hash TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outcomes (
    task TEXT PRIMARY KEY, kind TEXT NOT NULL, code TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS bounds (part TEXT NOT NULL, history TEXT NOT NULL, delta REAL NOT NULL,
    epsilon REAL NOT NULL, accountant TEXT NOT NULL, PRIMARY KEY (part, history, delta));
"""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One row: what a task will release. ``part``: train, validation or test."""

    task: str
    run: str
    plan_hash: str
    study: str
    server_round: int
    purpose: str
    part: str
    spend: Spend
    nominal_patients: int
    mechanism: str = "subsampled_gaussian"
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def row(self) -> dict[str, object]:
        """Returns the columns, without number and hashes."""
        columns = asdict(self)
        columns |= columns.pop("spend")
        return columns


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a charged task ended: ``stored`` (a reply may have been sent) or ``failed`` with a code."""

    kind: str
    code: str


class Ledger:
    """The ledger file of one site.

    Args:
        path: the SQLite file; made when absent.
        max_epsilon, delta: the hospital's budget for everything that this ledger ever records.
    """

    def __init__(self, path: Path, *, max_epsilon: float, delta: float) -> None:
        self._max_epsilon, self._delta = max_epsilon, delta
        self._path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None, timeout=60)
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
            self.verify()
        except sqlite3.DatabaseError as error:
            raise StateError(
                f"Expected a readable ledger at {path}, found: {error}; restore it from a backup. "
                "Nothing is released without a ledger."
            ) from None

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def charge(self, charge: Charge, *, max_repeats: int) -> bool:
        """Records a charge, durably, before the task begins.

        Returns:
            True for a new charge; False where this very task was charged before.

        Raises:
            Refusal: code ``budget_exceeded`` or ``too_many_repeats``; nothing is recorded.
        """
        with self._transaction():
            if self._exists(charge.task):
                return False
            if self._repeats(charge) > max_repeats:
                raise Refusal("too_many_repeats")
            history = self._histories()
            history[charge.part] = merged([*history[charge.part], charge.spend])
            self._require_affordable(charge.part, history[charge.part])
            self._append(charge)
            return True

    def require_affordable(self, spends: Mapping[str, tuple[Spend, ...]]) -> None:
        """Checks that a whole run fits the budget on top of all that was charged.

        The bound is remembered: charges within it need no further accounting.

        Raises:
            Refusal: code ``budget_exceeded``.
        """
        with self._transaction():
            history = self._histories()
            for part, spend in spends.items():
                self._require_affordable(part, merged([*history[part], *spend]))

    def projected(self, spends: Mapping[str, tuple[Spend, ...]]) -> tuple[Epsilon, Epsilon]:
        """Returns what spends would cost alone, and what the whole ledger would be at after them."""
        history = self._histories()
        after = {
            part: merged([*history.get(part, ()), *spends.get(part, ())]) for part in {*history, *spends}
        }
        return worst_epsilon(dict(spends), delta=self._delta), worst_epsilon(after, delta=self._delta)

    def finish(self, task: str, outcome: Outcome) -> None:
        """Records how a charged task ended; the first outcome stands."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._transaction():
            self._database.execute(
                "INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?, ?)", (task, outcome.kind, outcome.code, now)
            )

    def outcome(self, task: str) -> Outcome | None:
        """Returns how a task ended; None where it never did, so it has released nothing."""
        row = self._database.execute("SELECT kind, code FROM outcomes WHERE task = ?", (task,)).fetchone()
        return Outcome(kind=row[0], code=row[1]) if row else None

    def spent(self, *, run: str | None = None) -> Epsilon:
        """Returns the cumulative epsilon of the whole ledger, or of one run alone."""
        return worst_epsilon(self._histories(run=run), delta=self._delta)

    def verify(self) -> None:
        """Checks the hash chain.

        Raises:
            StateError: a row was edited, removed or reordered.
        """
        previous = _GENESIS
        cursor = self._database.execute("SELECT * FROM charges ORDER BY number")
        names = [column[0] for column in cursor.description]
        for expected_number, values in enumerate(cursor, start=1):
            row = dict(zip(names, values, strict=True))
            number, recorded, before = row.pop("number"), row.pop("hash"), row.pop("previous_hash")
            if number != expected_number or before != previous or recorded != _hash(row, previous):
                raise StateError(self._broken(f"row {number} changed or a row before it missing"))
            previous = recorded
        query = "SELECT COUNT(*) FROM outcomes WHERE task NOT IN (SELECT task FROM charges)"
        if self._database.execute(query).fetchone()[0]:
            raise StateError(self._broken("the outcome of a charge that is missing"))

    def _broken(self, found: str) -> str:
        return (
            f"Expected an unbroken chain of charges in {self._path}, found {found}; restore the ledger from "
            "a backup. Nothing is released until then."
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _exists(self, task: str) -> bool:
        return self._database.execute("SELECT 1 FROM charges WHERE task = ?", (task,)).fetchone() is not None

    def _repeats(self, charge: Charge) -> int:
        query = (
            "SELECT COUNT(*) FROM charges WHERE run = ? AND plan_hash = ? AND server_round = ? "
            "AND purpose = ? AND part = ?"
        )
        key = (charge.run, charge.plan_hash, charge.server_round, charge.purpose, charge.part)
        return int(self._database.execute(query, key).fetchone()[0])

    def _histories(self, *, run: str | None = None) -> dict[str, tuple[Spend, ...]]:
        query = "SELECT part, noise_multiplier, sample_rate, SUM(steps) FROM charges "
        query += "WHERE run = ? " if run is not None else ""
        query += "GROUP BY part, noise_multiplier, sample_rate"
        spends: dict[str, list[Spend]] = defaultdict(list)
        for part, noise, rate, steps in self._database.execute(query, (run,) if run is not None else ()):
            spends[part].append(Spend(noise_multiplier=noise, sample_rate=rate, steps=steps))
        return defaultdict(tuple, {part: merged(history) for part, history in spends.items()})

    def _require_affordable(self, part: str, history: tuple[Spend, ...]) -> None:
        if self._within_known_bound(part, history):
            return
        bound = epsilon(history, delta=self._delta)
        if bound.value > self._max_epsilon:
            raise Refusal(
                "budget_exceeded",
                f"Expected epsilon <= {self._max_epsilon:g} at delta={self._delta:g} over the whole ledger, "
                f"found that {bound.value:.3f} would be reached; raise max_epsilon in site.yaml or decline.",
            )
        self._database.execute(
            "INSERT OR REPLACE INTO bounds VALUES (?, ?, ?, ?, ?)",
            (part, canonical_json([asdict(s) for s in history]), self._delta, bound.value, bound.accountant),
        )

    def _within_known_bound(self, part: str, history: tuple[Spend, ...]) -> bool:
        """Epsilon grows with every step, so a history inside an affordable one is affordable."""
        needed = {(s.noise_multiplier, s.sample_rate): s.steps for s in history}
        query = "SELECT history FROM bounds WHERE part = ? AND delta = ? AND epsilon <= ?"
        for (text,) in self._database.execute(query, (part, self._delta, self._max_epsilon)):
            known = {(s["noise_multiplier"], s["sample_rate"]): s["steps"] for s in json.loads(text)}
            if all(steps <= known.get(kind, 0) for kind, steps in needed.items()):
                return True
        return False

    def _append(self, charge: Charge) -> None:
        last = self._database.execute(
            "SELECT number, hash FROM charges ORDER BY number DESC LIMIT 1"
        ).fetchone()
        number, previous = (last[0] + 1, last[1]) if last else (1, _GENESIS)
        row = charge.row()
        columns = {"number": number, **row, "previous_hash": previous, "hash": _hash(row, previous)}
        marks = ", ".join(f":{name}" for name in columns)
        names = ", ".join(columns)
        self._database.execute(f"INSERT INTO charges ({names}) VALUES ({marks})", columns)


def _hash(row: Mapping[str, object], previous: str) -> str:
    return hashlib.sha256((previous + canonical_json(dict(row))).encode()).hexdigest()
