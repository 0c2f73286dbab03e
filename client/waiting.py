"""Plans that have come and nobody has approved: kept for a person to look at, a bounded number of them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from client.files import write_private
from client.site import Site
from common.errors import ConfigError
from common.plan import Plan

logger = logging.getLogger("feverfew.site")

MOST: Final = 32
"""A coordinator may send as many plans as it likes; the oldest makes way."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A plan that waits; ``since``: when it came first, UTC."""

    plan: Plan
    since: str


def keep(site: Site, plan: Plan) -> None:
    """Keeps a plan that has come; one that waits already keeps its time."""
    path = _path(site, plan.hash)
    if path.exists():
        return
    record = {
        "plan_hash": plan.hash,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": plan.model_dump(mode="json"),
    }
    write_private(path, content=json.dumps(record, indent=1).encode())
    logger.info("plan %s of study %s waits for approval", plan.hash[:12], plan.study)
    for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)[:-MOST]:
        old.unlink(missing_ok=True)


def forget(site: Site, plan: Plan) -> None:
    """Lets a plan go that has been decided about."""
    _path(site, plan.hash).unlink(missing_ok=True)


def every(site: Site) -> list[Waiting]:
    """Returns the plans that wait, the oldest first; a file that holds something else is left out."""
    found = [_read(path) for path in _path(site, "").parent.glob("*.json")]
    return sorted((one for one in found if one is not None), key=lambda one: one.since)


def _path(site: Site, plan_hash: str) -> Path:
    """Beside the approvals, so that a rehearsal, which has some of its own, leaves no plan here."""
    return site.approvals.with_name("waiting") / f"{plan_hash}.json"


def _read(path: Path) -> Waiting | None:
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        plan, since = Plan.from_tree(record["plan"]), str(record["since"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ConfigError):
        return None
    return Waiting(plan=plan, since=since) if plan.hash == path.stem else None
