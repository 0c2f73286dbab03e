"""Which plans this hospital has agreed to, and what it never agrees to."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from client import trail
from client.site import Site
from common import durable
from common.errors import Refusal
from common.plan import NoPrivacy, Plan
from common.trail import account


def require(site: Site, plan: Plan) -> None:
    """Checks that the hospital agreed to a plan. The hospital's own limits win over any approval.

    Raises:
        Refusal: code ``seeded_noise``, ``no_privacy`` or ``not_approved``.
    """
    is_exact = isinstance(plan.privacy, NoPrivacy)
    if is_exact and site.settings.data == "private" and not site.settings.unsafe_allow_no_privacy:
        raise Refusal("no_privacy")
    if plan.randomness == "seeded" and not site.settings.unsafe_allow_seeded_noise:
        raise Refusal("seeded_noise")
    if site.settings.approve != "all" and not is_approved(site, plan):
        raise Refusal("not_approved")


def is_approved(site: Site, plan: Plan) -> bool:
    """Says whether a person recorded an approval of exactly this plan."""
    return (site.private / "approvals" / f"{plan.hash}.json").is_file()


def keep(site: Site, plan: Plan) -> None:
    """Keeps a plan that this site is about to work on; a lost ledger is restored from what is kept."""
    directory = _kept(site)
    if not (directory / f"{plan.hash}.json").exists():
        _write(directory, plan)


def known_plans(site: Site) -> dict[str, Plan]:
    """Returns every plan that this site approved or kept, by hash, the oldest first."""
    directories = (site.private / "approvals", _kept(site))
    paths = [path for directory in directories for path in directory.glob("*.json")]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    plans = [Plan.model_validate(record["plan"]) for record in sorted(records, key=lambda one: one["time"])]
    return {plan.hash: plan for plan in plans}


def approve(site: Site, plan: Plan) -> None:
    """Records a person's approval of exactly this plan."""
    _write(site.private / "approvals", plan)
    trail.record(site, "approved", plan_hash=plan.hash, by=account())
    trail.sign(site)


def _kept(site: Site) -> Path:
    """Beside the state, so that a rehearsal, which has a state of its own, leaves no plan here."""
    return site.state.with_name("plans")


def _write(directory: Path, plan: Plan) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = {
        "plan_hash": plan.hash,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": plan.model_dump(mode="json"),
    }
    durable.write(directory / f"{plan.hash}.json", json.dumps(record, indent=1).encode())
