"""Puts a broken or lost ledger right again, with charges for what it may have held.

What is intact is kept; the rest is taken for spent. A restoration leaves a gap in the numbers of the rows, so
that it can be seen for ever, and names the head that it covers, so that a coordinator that remembers it is
content.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client import approval, release, trail, unsigned_ledger
from client.cost import planned_spends
from client.files import private_directory
from client.journal import COLUMNS, Journal, read_head, sound_rows
from client.ledger import RESTORED, Charge, now
from client.site import Site
from common import durable, keys
from common.chain import Head
from common.errors import LedgerError, UserError
from common.keys import PublicKey
from common.plan import SCHEMA_VERSION, Plan
from common.trail import account

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What a restoration did: rows kept, plans charged in full, and where the old file is; "" for nowhere."""

    num_kept: int
    charged: tuple[Plan, ...]
    old_file: str


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What can be read of a broken ledger: the intact rows, and those after them, which prove nothing."""

    kept: tuple[Row, ...] = ()
    rest: tuple[Row, ...] = ()


def restore(site: Site, *, plans: Sequence[Plan] | None = None) -> Restoration:
    """Writes a new ledger: the intact rows, and a charge for each plan in full, whatever the budget.

    Args:
        plans: what is charged, each as often as it is named; None for all that ``may_be_missing``.

    Raises:
        UserError: nothing is broken; or more is missing than the plans that the site keeps account for.
    """
    path = release.ledger_path(site)
    with durable.locked(private_directory(site.state) / "task.lock"):
        claimed = _require_broken(site)
        key = keys.own(site.private / "site.key")
        remains = read_remains(path, key=key.public_key())
        head = read_head(release.head_path(site))
        own = head if head is not None and head.is_signed_by(key.public_key()) else None
        last = max([row["number"] for row in (*remains.kept, *remains.rest)], default=0)
        covered = [one for one in (own, claimed) if one is not None and one.number > 0]
        if plans is None:
            plans = may_be_missing(site, remains)
            _require_accounted(site, plans, missing=max([one.number for one in covered], default=0) - last)
        fresh, fresh_head = path.with_suffix(".restored"), path.with_suffix(".restored_head")
        fresh.unlink(missing_ok=True)
        fresh_head.unlink(missing_ok=True)
        with closing(Journal(fresh, head=fresh_head, key=key)) as journal, journal.transaction():
            journal.copy(remains.kept)
            marker = {"kind": "restore", "task": secrets.token_hex(32), "time": now()}
            marker["code"] = json.dumps([one.hash for one in covered])
            # by our own word alone: a coordinator could claim any number
            journal.append(
                marker, number=2 + (last + _rows(site, plans) if own is None else max(last, own.number))
            )
            for plan in plans:
                for charge in _charges(site, plan, run=f"{RESTORED}-{secrets.token_hex(4)}"):
                    journal.append(charge.row())
        old_file = _copied_aside(path)
        # SQLite would play what is left of an old transaction into the new file.
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
        os.replace(fresh, path)
        os.replace(fresh_head, release.head_path(site))  # the old one is covered, if this is never reached
        durable.spare_of(fresh_head).unlink(missing_ok=True)
        release.claim_path(site).unlink(missing_ok=True)
    charged = [plan.hash for plan in plans]
    trail.record(site, "ledger_restored", kept=len(remains.kept), charged=charged, by=account())
    trail.sign(site)
    return Restoration(num_kept=len(remains.kept), charged=tuple(plans), old_file=old_file)


def _require_broken(site: Site) -> Head | None:
    """Returns the head that a coordinator claims and this site does not know, if that is what is wrong."""
    claimed = read_head(release.claim_path(site))
    try:
        with release.open_ledger(site) as ledger:
            ledger.verify_signatures()
            if claimed is not None:
                ledger.require_known(claimed)
    except LedgerError:
        return claimed
    raise UserError(
        f"Expected a broken ledger in {release.ledger_path(site)}, found an intact one; nothing was changed."
    )


def read_remains(path: Path, *, key: PublicKey) -> Remains:
    """Reads as much of a ledger as there is."""
    if not path.exists():
        return Remains()
    rows: list[Row] = []
    unsigned: list[Row] = []
    # What a damaged file still gives before the first error counts; the rest is what may be missing.
    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.DatabaseError):
        if unsigned_ledger.is_in(database):
            for number, row in enumerate(unsigned_ledger.rows(database), start=1):
                unsigned.append({"number": number, **row})
        for values in database.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY number"):
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    heads, _ = sound_rows(rows)
    while heads and not heads[-1].is_signed_by(key):
        heads.pop()
    return Remains(kept=tuple(rows[: len(heads)]), rest=(*rows[len(heads) :], *unsigned))


def may_be_missing(site: Site, remains: Remains) -> tuple[Plan, ...]:
    """Returns the plans about which rows may have been lost, once for each run that may be concerned.

    These are the runs of which any row is not intact, or of which the intact rows are not the whole; and
    every plan that was approved or worked on and has no run at all in the ledger.

    Raises:
        UserError: a row is of a plan that the site does not keep.
    """
    known = approval.known_plans(site)
    if unreadable := approval.unreadable_plans(site):
        raise UserError(
            f"Expected plans of schema {SCHEMA_VERSION} in {unreadable[0].parent}, found "
            f"{unreadable[0].name} of another version; name with --plan a plan of this version that costs as "
            "much, for each of these."
        )
    begun = {(row["plan_hash"], row["run"]) for row in remains.rest if row["kind"] == "charge"}
    kept = {(row["plan_hash"], row["run"]) for row in remains.kept if row["kind"] == "charge"}
    unknown = sorted(str(plan_hash) for plan_hash, _ in begun if plan_hash not in known)
    if unknown:
        raise UserError(
            f"Expected to know every plan in {release.ledger_path(site)}, found a charge of {unknown[0]}; "
            "name the files of all plans about which rows may be missing with --plan."
        )
    partial = {run for run in kept if run[0] in known and not _is_whole(site, known[run[0]], run[1], remains)}
    concerned = Counter(plan_hash for plan_hash, _ in begun | partial)
    seen = {plan_hash for plan_hash, _ in kept}
    return tuple(
        plan
        for plan_hash, plan in known.items()
        for _ in range(concerned[plan_hash] if plan_hash in seen else max(1, concerned[plan_hash]))
    )


def _is_whole(site: Site, plan: Plan, run: str, remains: Remains) -> bool:
    steps: Counter[str] = Counter()
    for row in remains.kept:
        if row["kind"] == "charge" and (row["plan_hash"], row["run"]) == (plan.hash, run):
            steps[row["part"]] += row["steps"]
    wanted = {part: sum(s.steps for s in spends) for part, spends in planned_spends(site, plan).items()}
    return all(steps[part] >= count for part, count in wanted.items())


def _require_accounted(site: Site, plans: Sequence[Plan], *, missing: int) -> None:
    """Checks that so many rows can be those of runs of these plans."""
    rows = _rows(site, plans)
    if missing > rows:
        raise UserError(
            f"Expected {missing} missing rows to be those of plans that this site keeps, found plans for "
            f"{rows} of them; name with --plan the file of every plan that may have run since, each as often "
            "as it may have run."
        )


def _rows(site: Site, plans: Sequence[Plan]) -> int:
    """Returns how many rows runs of these plans have at most: two for a task, charge and outcome.

    A head within so many rows is covered by what is charged for them, where no second file says more.
    """
    return sum(2 * _num_tasks(site, plan) for plan in plans)


def _num_tasks(site: Site, plan: Plan) -> int:
    parts = site.settings.split.parts
    return (
        plan.rounds * (site.settings.role == "training")
        + len(plan.validation_rounds) * ("validation" in parts)
        + plan.evaluation.test_at_end * ("test" in parts)
    )


def _charges(site: Site, plan: Plan, *, run: str) -> Iterator[Charge]:
    for part, spends in planned_spends(site, plan).items():
        for spend in spends:
            yield Charge(
                task=secrets.token_hex(32),
                run=run,
                plan_hash=plan.hash,
                study=plan.study,
                server_round=0,
                purpose=RESTORED,
                part=part,
                spend=spend,
                nominal_patients=site.settings.nominal_patients,
            )


def _copied_aside(path: Path) -> str:
    """Keeps the old file for whoever wants to know what happened."""
    if not path.exists():
        return ""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    copy = path.with_name(f"ledger-broken-{stamp}.sqlite")
    shutil.copy2(path, copy)
    return str(copy)
