"""A plan as a hospital reads it before it decides: all of it, what it costs, what leaves, what is new."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from client import approval, decision, difference, leaving
from client.approval import Answer
from client.cost import run_epsilon
from client.difference import Change
from client.leaving import Leaving
from client.site import Site
from client.statement import statement
from common.errors import PrivacyTargetError, Refusal
from common.plan import Plan

SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "Study": ("study", "schema_version"),
    "Model": ("model",),
    "Data": ("target", "classes", "clinical", "preprocessing.inputs"),
    "Preprocessing, steps in this order": ("preprocessing",),
    "Rounds and steps": ("rounds", "sites", "sites_per_round", "quorum", "training"),
    "Privacy": ("privacy", "randomness", "seed"),
    "Evaluation": ("evaluation",),
    "Averaging": ("strategy",),
    "Exchange": ("exchange",),
    "Deadlines": ("",),
}
"""Which keys of a plan stand under which heading: those that begin so and stand under none before."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs a patient here, and what is left then; None where nothing bounds or limits it.

    ``problem`` says why the run cannot be paid; "" if it can.
    """

    epsilon: float | None
    delta: float
    total_epsilon: float | None
    max_epsilon: float
    left: float | None
    study_epsilon: float | None
    study_max_epsilon: float | None
    study_left: float | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """All that a person should know who decides about a plan.

    ``obstacle`` is the code with which this site declines whatever the person says; "" if it does not.
    ``sections`` hold every key of the plan. ``compared_with`` is the hash of the last plan that was
    approved, of the same study if there is one; "" if none was.
    """

    site: str
    plan_hash: str
    study: str
    status: str
    decided_by: str
    obstacle: str
    cost: Cost
    sections: dict[str, dict[str, Any]]
    leaves: tuple[Leaving, ...]
    compared_with: str
    changes: tuple[Change, ...]

    def to_tree(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """Returns the proposal as one JSON object."""
        return json.dumps(self.to_tree(), indent=2, allow_nan=False)


def proposal(site: Site, plan: Plan) -> Proposal:
    """Reads rules, decisions and ledger; changes nothing.

    Raises:
        LedgerError: the ledger is broken.
    """
    last = last_approved(site, plan)
    found = approval.answer(site, plan)
    return Proposal(
        site=site.name,
        plan_hash=plan.hash,
        study=plan.study,
        status=found.status,
        decided_by="" if found.status == "waiting" else found.author,
        obstacle=_obstacle(site, plan, found),
        cost=_cost(site, plan),
        sections=sections(plan),
        leaves=tuple(leaving.leaving(site, plan)),
        compared_with="" if last is None else last.hash,
        changes=() if last is None else tuple(difference.changes(last, plan)),
    )


def sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns every key of a plan with its value, under headings."""
    left = difference.leaves(plan)
    found: dict[str, dict[str, Any]] = {}
    for title, beginnings in SECTIONS.items():
        keys = [key for key in left if any(_begins(key, beginning) for beginning in beginnings)]
        found[title] = {key: left.pop(key) for key in keys}
    steps = {"steps of one site in the whole run": plan.num_steps}
    found["Rounds and steps"] |= steps
    return found


def last_approved(site: Site, plan: Plan) -> Plan | None:
    """Returns the plan that was approved last, of the same study if there is one; never this very plan."""
    agreed = [
        told.plan
        for told in decision.every(site)
        if told.verdict == "approved" and told.plan_hash != plan.hash
    ]
    of_study = [one for one in agreed if one.study == plan.study]
    return next(reversed(of_study or agreed), None)


def _begins(key: str, beginning: str) -> bool:
    return not beginning or key == beginning or key.startswith(f"{beginning}.")


def _obstacle(site: Site, plan: Plan, found: Answer) -> str:
    try:
        approval.require_allowed(site, plan)
    except Refusal as refusal:
        return refusal.code
    return "plan_refused" if found.status == "refused" and found.rule is not None else ""


def _cost(site: Site, plan: Plan) -> Cost:
    epsilon = run_epsilon(site, plan)
    is_bounded = epsilon < float("inf")
    try:
        told = statement(site, what_if=plan)
        problem = "" if told.what_if is None else told.what_if.reason
    except PrivacyTargetError as error:
        told, problem = statement(site), str(error)
    asked = told.what_if if is_bounded else None
    limit = next((one.max_epsilon for one in site.settings.study_budgets if one.study == plan.study), None)
    return Cost(
        epsilon=epsilon if is_bounded else None,
        delta=told.delta,
        total_epsilon=None if asked is None else asked.total_epsilon,
        max_epsilon=told.max_epsilon,
        left=None if asked is None else _left(told.max_epsilon, asked.total_epsilon),
        study_epsilon=None if asked is None else asked.study_epsilon,
        study_max_epsilon=limit,
        study_left=None if asked is None or limit is None else _left(limit, asked.study_epsilon),
        problem=problem,
    )


def _left(limit: float, spent: float) -> float:
    return max(0.0, limit - spent)
