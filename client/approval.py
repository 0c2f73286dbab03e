"""Which plans this hospital has agreed to, and what it never agrees to.

In this order, the first that applies decides: what ``site.yaml`` never allows; a rule that refuses; what a
person has decided about exactly this plan; a rule that approves. What is left waits for a person.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from client import cost, decision, policies, trail, waiting
from client.decision import Decision, Verdict
from client.policies import Policy
from client.site import Site
from common import durable
from common.errors import ConfigError, Refusal, UserError
from common.plan import NoPrivacy, Plan
from common.trail import account


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What holds about a plan now, and which rule or whose decision made it so; None for nobody's."""

    status: Literal["approved", "refused", "waiting"]
    rule: Policy | None = None
    decided: Decision | None = None

    @property
    def author(self) -> str:
        """Returns in a few words who decided."""
        if self.rule is not None:
            return f"the rule {self.rule.name!r}"
        return "nobody" if self.decided is None else self.decided.who


def require(site: Site, plan: Plan) -> None:
    """Checks that the hospital agreed to a plan. The hospital's own limits win over any approval.

    Raises:
        Refusal: code ``seeded_noise``, ``no_privacy``, ``plan_refused`` or ``not_approved``.
    """
    require_allowed(site, plan)
    found = answer(site, plan)
    if found.rule is not None:
        _note(site, plan, found.rule)
    if found.status == "refused":
        raise Refusal("plan_refused")
    if found.status == "waiting":
        raise Refusal("not_approved")


def require_allowed(site: Site, plan: Plan) -> None:
    """Checks what no approval replaces.

    Raises:
        Refusal: code ``seeded_noise`` or ``no_privacy``.
    """
    is_exact = isinstance(plan.privacy, NoPrivacy)
    if is_exact and site.settings.data == "private" and not site.settings.unsafe_allow_no_privacy:
        raise Refusal("no_privacy")
    if plan.randomness == "seeded" and not site.settings.unsafe_allow_seeded_noise:
        raise Refusal("seeded_noise")


def answer(site: Site, plan: Plan) -> Answer:
    """Returns what rules and persons have decided about a plan, as both are now."""
    rule = _first(site, "refuse", plan)
    if rule is not None:
        return Answer(status="refused", rule=rule)
    decided = decision.find(site, plan.hash, by="person")
    if decided is not None:
        verdict = decided.verdict
        return Answer(status="waiting" if verdict == "withdrawn" else verdict, decided=decided)
    rule = _first(site, "approve", plan)
    return Answer(status="waiting" if rule is None else "approved", rule=rule)


def decide(site: Site, plan: Plan, verdict: Verdict, *, reason: str = "") -> Decision:
    """Records what the person who runs this process has decided about exactly this plan.

    A plan whose approval is withdrawn waits, also where a rule would approve it.

    Raises:
        UserError: there is no approval to withdraw.
    """
    if verdict == "withdrawn" and answer(site, plan).status != "approved":
        raise UserError(
            f"Expected an approval of plan {plan.hash[:12]} to withdraw, found none; see --refuse."
        )
    told = decision.record(site, plan, verdict, by="person", who=account(), reason=reason)
    waiting.forget(site, plan)
    trail.record(site, verdict, plan_hash=plan.hash, by=told.who)
    trail.sign(site)
    return told


def keep(site: Site, plan: Plan) -> None:
    """Keeps a plan that this site is about to work on; a lost ledger is restored from what is kept."""
    path = plans_path(site) / f"{plan.hash}.json"
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = {
        "plan_hash": plan.hash,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": plan.model_dump(mode="json"),
    }
    durable.write(path, json.dumps(record, indent=1).encode())


def known_plans(site: Site) -> dict[str, Plan]:
    """Returns every plan that a person here approved, or that was kept, by hash, the oldest first."""
    kept = [found for path in _kept_files(site) if (found := _read_kept(path)) is not None]
    agreed = [
        (told.time, told.plan)
        for told in decision.every(site)
        if (told.by, told.verdict) == ("person", "approved")
    ]
    return {plan.hash: plan for _, plan in sorted([*kept, *agreed], key=lambda one: one[0])}


def unreadable_plans(site: Site) -> list[Path]:
    """Returns the files of plans that were kept by a version with another schema, or are damaged."""
    return [path for path in _kept_files(site) if _read_kept(path) is None]


def has_worked(site: Site) -> bool:
    """Says whether this site ever worked on a plan: then it had a ledger."""
    return bool(_kept_files(site))


def _kept_files(site: Site) -> list[Path]:
    return sorted(plans_path(site).glob("*.json"))


def _read_kept(path: Path) -> tuple[str, Plan] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return str(record["time"]), Plan.from_tree(record["plan"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return None


def plans_path(site: Site) -> Path:
    """Returns the folder of the plans that are kept.

    It is beside the state, so that a rehearsal, which has a state of its own, leaves no plan here.
    """
    return site.state.with_name("plans")


def _first(site: Site, kind: Literal["approve", "refuse"], plan: Plan) -> Policy | None:
    epsilon = partial(cost.run_epsilon, site, plan)
    return policies.first(site.settings.policies, kind, plan, epsilon=epsilon)


def _note(site: Site, plan: Plan, rule: Policy) -> None:
    """Records, once for a plan, which rule decided."""
    verdict: Verdict = "approved" if rule.decision == "approve" else "refused"
    changed_at = decision.changed_at(site, plan.hash, by="rule")
    if _ruled(site, plan.hash, changed_at) != (verdict, rule.name):
        decision.record(site, plan, verdict, by="rule", who=rule.name)
        trail.record(site, verdict, plan_hash=plan.hash, by=f"rule {rule.name}")
        _ruled(site, plan.hash, decision.changed_at(site, plan.hash, by="rule"))  # known when a task asks


@lru_cache(maxsize=1024)  # each task asks several times
def _ruled(site: Site, plan_hash: str, changed_at: int) -> tuple[str, str] | None:
    """Returns what is noted of a rule's decision, in a file that was changed then."""
    return decision.noted(site, plan_hash)
