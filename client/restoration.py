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

from filelock import FileLock

from client import approval, release
from client.files import private_directory
from client.journal import COLUMNS, Journal, read_head, sound_rows
from client.ledger import RESTORED, Charge, now
from client.site import Site
from client.work import planned_spends
from common import keys
from common.errors import LedgerError, UserError
from common.keys import PublicKey
from common.plan import Plan

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
        plans: what is charged; None for every plan that this site has approved or worked on, but those
            of which the intact rows hold a whole run and the others none.

    Raises:
        UserError: nothing is broken; or a row is of a plan that the site does not keep.
    """
    path = release.ledger_path(site)
    with FileLock(private_directory(site.state) / "task.lock", mode=0o600):
        _require_broken(site)
        key = keys.own(site.private / "site.key")
        remains = read_remains(path, key=key.public_key())
        chosen = may_be_missing(site, remains) if plans is None else tuple(plans)
        head = read_head(release.head_path(site))
        covered = head if head is not None and head.is_signed_by(key.public_key()) else None
        last = max([row["number"] for row in (*remains.kept, *remains.rest)], default=0)
        fresh, fresh_head = path.with_suffix(".restored"), path.with_suffix(".restored_head")
        fresh.unlink(missing_ok=True)
        fresh_head.unlink(missing_ok=True)
        with closing(Journal(fresh, head=fresh_head, key=key)) as journal, journal.transaction():
            journal.copy(remains.kept)
            marker = {"kind": "restore", "task": secrets.token_hex(32), "time": now()}
            marker["code"] = json.dumps([covered.hash] if covered else [])
            journal.append(marker, number=2 + max(last, covered.number if covered else 0))
            for plan in chosen:
                for charge in _charges(site, plan):
                    journal.append(charge.row())
        old_file = _copied_aside(path)
        path.with_name(path.name + "-journal").unlink(
            missing_ok=True
        )  # SQLite would play it into the new file
        os.replace(fresh, path)
        os.replace(fresh_head, release.head_path(site))  # the old one is covered, if this is never reached
    return Restoration(num_kept=len(remains.kept), charged=chosen, old_file=old_file)


def _require_broken(site: Site) -> None:
    try:
        with release.open_ledger(site) as ledger:
            ledger.verify_signatures()
    except LedgerError:
        return
    raise UserError(
        f"Expected a broken ledger in {release.ledger_path(site)}, found an intact one; nothing was changed."
    )


def read_remains(path: Path, *, key: PublicKey) -> Remains:
    """Reads as much of a ledger as there is."""
    if not path.exists():
        return Remains()
    rows: list[Row] = []
    num_sound = 0
    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.DatabaseError):
        for values in database.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY number"):
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        heads, _ = sound_rows(rows)
        num_sound = len(heads)
        while num_sound and not heads[num_sound - 1].is_signed_by(key):
            num_sound -= 1
    return Remains(kept=tuple(rows[:num_sound]), rest=tuple(rows[num_sound:]))


def may_be_missing(site: Site, remains: Remains) -> tuple[Plan, ...]:
    """Returns the plans about which rows may have been lost.

    Raises:
        UserError: a row is of a plan that the site does not keep.
    """
    known = approval.known_plans(site)
    begun = {row["plan_hash"] for row in remains.rest if row["kind"] == "charge"}
    unknown = sorted(str(plan_hash) for plan_hash in begun - set(known))
    if unknown:
        raise UserError(
            f"Expected to know every plan in {release.ledger_path(site)}, found a charge of {unknown[0]}; "
            "name the files of all plans about which rows may be missing with --plan."
        )
    return tuple(
        plan
        for plan_hash, plan in known.items()
        if plan_hash in begun or not _has_whole_run(site, plan, remains.kept)
    )


def _has_whole_run(site: Site, plan: Plan, rows: Sequence[Row]) -> bool:
    steps: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row["kind"] == "charge" and row["plan_hash"] == plan.hash:
            steps[row["run"], row["part"]] += row["steps"]
    wanted = {part: sum(s.steps for s in spends) for part, spends in planned_spends(site, plan).items()}
    return any(
        all(steps[run, part] >= count for part, count in wanted.items()) for run in {run for run, _ in steps}
    )


def _charges(site: Site, plan: Plan) -> Iterator[Charge]:
    for part, spends in planned_spends(site, plan).items():
        for spend in spends:
            yield Charge(
                task=secrets.token_hex(32),
                run=RESTORED,
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
