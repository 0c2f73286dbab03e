"""The durable privacy ledger of one site: append only, charged before any release.

SQLite with ``synchronous=FULL``: when ``charge`` returns, the charge is on the disk. Charges and the outcomes
of tasks are rows of one signed hash chain (``client/journal.py``). One ledger per site, whatever the run,
plan or study; epsilon is always cumulative over all of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

from client.journal import Journal
from common import chain
from common.chain import Head
from common.errors import Refusal
from common.keys import PrivateKey
from common.privacy import Epsilon, Spend, epsilon, merged, worst_epsilon
from common.value import canonical_json

Histories = Mapping[str, tuple[Spend, ...]]
"""By part, all that was released about it."""

RESTORED: Final = "restored"
"""The purpose of a charge for what a lost part of the ledger may have held."""
NO_STUDY_BUDGETS: Final[Mapping[str, float]] = MappingProxyType({})


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
    time: str = field(default_factory=lambda: now())

    def row(self) -> dict[str, object]:
        """Returns the columns of ``client.journal``."""
        columns = asdict(self)
        columns |= columns.pop("spend")
        return {**columns, "kind": "charge"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a charged task ended: ``stored`` (a reply may have been sent) or ``failed`` with a code."""

    kind: str
    code: str


class Ledger:
    """The ledger file of one site.

    Args:
        path: the SQLite file; made when absent.
        head: the second file, which remembers the last row; made with the first.
        key: the site's key, which signs every row.
        max_epsilon, delta: the hospital's budget for everything that this ledger ever records.
        study_budgets: a smaller limit for some studies, by name.

    Raises:
        LedgerError: the chain is broken, or not as long as it was.
    """

    def __init__(
        self,
        path: Path,
        *,
        head: Path,
        key: PrivateKey,
        max_epsilon: float,
        delta: float,
        study_budgets: Mapping[str, float] = NO_STUDY_BUDGETS,
    ) -> None:
        self._max_epsilon, self._delta = max_epsilon, delta
        self._study_budgets = dict(study_budgets)
        self._key = key
        self._journal = Journal(path, head=head, key=key)
        self._journal.require_sound()

    def close(self) -> None:
        """Closes the file."""
        self._journal.close()

    @property
    def head(self) -> Head:
        """The last row, signed."""
        return self._journal.head()

    def require_known(self, head: Head) -> None:
        """Checks a head that a coordinator remembers of this site.

        Raises:
            LedgerError: the ledger was longer, or another, when that head was sent.
        """
        self._journal.require_known(head)

    def verify_signatures(self) -> None:
        """Checks the signature of every row, not of the last alone.

        Raises:
            LedgerError: somebody else wrote a row.
        """
        self._journal.verify(all_signatures=True)

    def charge(self, charge: Charge, *, max_repeats: int) -> bool:
        """Records a charge, durably, before the task begins.

        Returns:
            True for a new charge; False where this very task was charged before.

        Raises:
            Refusal: code ``budget_exceeded`` or ``too_many_repeats``; nothing is recorded.
        """
        with self._journal.transaction():
            if self._exists(charge.task):
                return False
            if self._repeats(charge) > max_repeats:
                raise Refusal("too_many_repeats")
            self._require_affordable({charge.part: (charge.spend,)}, study=charge.study)
            self._journal.append(charge.row())
            return True

    def require_affordable(self, spends: Histories, *, study: str) -> None:
        """Checks that a whole run fits the budgets on top of all that was charged.

        The bound is remembered: charges within it need no further accounting.

        Raises:
            Refusal: code ``budget_exceeded``.
        """
        with self._journal.transaction():
            self._require_affordable(spends, study=study)

    def projected(self, spends: Histories, *, study: str | None = None) -> tuple[Epsilon, Epsilon]:
        """Returns what spends would cost alone, and what the ledger, or one study of it, would be at."""
        after = _added(self.histories(study=study), spends)
        return worst_epsilon(dict(spends), delta=self._delta), worst_epsilon(after, delta=self._delta)

    def finish(self, task: str, outcome: Outcome) -> None:
        """Records how a charged task ended; the first outcome stands."""
        with self._journal.transaction():
            if self.outcome(task) is None:
                self._journal.append(
                    {"kind": outcome.kind, "task": task, "code": outcome.code, "time": now()}
                )

    def outcome(self, task: str) -> Outcome | None:
        """Returns how a task ended; None where it never did, so it has released nothing."""
        query = "SELECT kind, code FROM entries WHERE task = ? AND kind IN ('stored', 'failed')"
        row = next(self._journal.select(query, task), None)
        return Outcome(kind=row[0], code=row[1]) if row else None

    def spent(self, *, run: str | None = None, study: str | None = None) -> Epsilon:
        """Returns the cumulative epsilon of the whole ledger, or of one run or study alone."""
        return worst_epsilon(dict(self.histories(run=run, study=study)), delta=self._delta)

    def runs(self) -> list[tuple[str, str, str, int]]:
        """Returns (study, run, plan hash, number of charges) of every run, in order of their first charge."""
        query = "SELECT study, run, plan_hash, COUNT(*) FROM entries WHERE kind = 'charge' "
        return list(self._journal.select(query + "GROUP BY study, run, plan_hash ORDER BY MIN(number)"))

    def histories(self, *, run: str | None = None, study: str | None = None) -> Histories:
        """Returns all that was charged, or what one run or study was, by part."""
        query = "SELECT part, noise_multiplier, sample_rate, SUM(steps) FROM entries WHERE kind = 'charge' "
        wanted = {name: value for name, value in (("run", run), ("study", study)) if value is not None}
        query += "".join(f"AND {name} = ? " for name in wanted)
        query += "GROUP BY part, noise_multiplier, sample_rate"
        spends: dict[str, list[Spend]] = defaultdict(list)
        for part, noise, rate, steps in self._journal.select(query, *wanted.values()):
            spends[part].append(Spend(noise_multiplier=noise, sample_rate=rate, steps=steps))
        return {part: merged(history) for part, history in spends.items()}

    def _exists(self, task: str) -> bool:
        query = "SELECT 1 FROM entries WHERE task = ? AND kind = 'charge'"
        return next(self._journal.select(query, task), None) is not None

    def _repeats(self, charge: Charge) -> int:
        query = (
            "SELECT COUNT(*) FROM entries WHERE kind = 'charge' AND run = ? AND plan_hash = ? AND "
            "server_round = ? AND purpose = ? AND part = ?"
        )
        key = (charge.run, charge.plan_hash, charge.server_round, charge.purpose, charge.part)
        return int(next(self._journal.select(query, *key))[0])

    def _require_affordable(self, spends: Histories, *, study: str) -> None:
        budgets: list[tuple[str | None, float]] = [(None, self._max_epsilon)]
        if study in self._study_budgets:
            budgets.append((study, self._study_budgets[study]))
        for scope, limit in budgets:
            after = _added(self.histories(study=scope), spends)
            for part in spends:
                self._require_within(limit, after[part], scope=f"{scope or ''}/{part}", study=scope)

    def _require_within(
        self, limit: float, history: tuple[Spend, ...], *, scope: str, study: str | None
    ) -> None:
        if self._is_within_known_bound(limit, history, scope=scope):
            return
        bound = epsilon(history, delta=self._delta)
        if bound.value > limit:
            what, key = (
                ("the whole ledger", "max_epsilon")
                if study is None
                else (
                    f"study {study}",
                    "study_budgets",
                )
            )
            raise Refusal(
                "budget_exceeded",
                f"Expected epsilon <= {limit:g} at delta={self._delta:g} over {what}, "
                f"found that {bound.value:.3f} would be reached; raise {key} in site.yaml or decline.",
            )
        text = canonical_json([asdict(spend) for spend in history])
        row = (scope, text, self._delta, bound.value)
        self._journal.remember_bound(*row, chain.signature(canonical_json(list(row)), key=self._key))

    def _is_within_known_bound(self, limit: float, history: tuple[Spend, ...], *, scope: str) -> bool:
        """Epsilon grows with every step, so a history inside an affordable one is affordable."""
        needed = {(spend.noise_multiplier, spend.sample_rate): spend.steps for spend in history}
        query = (
            "SELECT history, epsilon, signature FROM bounds WHERE scope = ? AND delta = ? AND epsilon <= ?"
        )
        for text, bound, claimed in self._journal.select(query, scope, self._delta, limit):
            known = {(s["noise_multiplier"], s["sample_rate"]): s["steps"] for s in json.loads(text)}
            if all(steps <= known.get(kind, 0) for kind, steps in needed.items()):
                row = canonical_json([scope, text, self._delta, bound])
                if chain.is_signature(claimed, key=self._key.public_key(), text=row):
                    return True
        return False


def now() -> str:
    """Returns the present time as rows have it: UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _added(history: Histories, spends: Histories) -> dict[str, tuple[Spend, ...]]:
    return {
        part: merged([*history.get(part, ()), *spends.get(part, ())]) for part in sorted({*history, *spends})
    }
