"""The conversation in which a person decides about a plan: ``feverfew-client approve``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from client import approval, decision, prospectus, waiting
from client.decision import Decision, Verdict
from client.proposal import proposal
from client.site import Site
from common.errors import DataError, UserError
from common.plan import Plan

PREFIX: Final = re.compile(r"[0-9a-f]{6,64}")
QUESTION: Final[dict[Verdict, str]] = {
    "approved": "Approve exactly this plan?",
    "refused": "Refuse this plan?",
    "withdrawn": "Withdraw the approval of this plan?",
}


def listed(site: Site, *, as_json: bool) -> int:
    """Tells which plans wait and what was decided; returns the exit code."""
    waits, decided = undecided(site), decision.every(site)
    invalid = [str(path) for path in decision.invalid(site)]
    if as_json:
        tree = {
            "waiting": [
                {"plan_hash": one.plan.hash, "study": one.plan.study, "since": one.since} for one in waits
            ],
            "decided": [_tree(one) for one in decided],
            "invalid": invalid,
        }
        print(json.dumps(tree, indent=2))
        return 0
    console = Console()
    prospectus.show_all(waits, decided, console=console)
    for path in invalid:
        console.print(f"{path} is no decision of this site and counts for nothing", markup=False)
    return 0


def undecided(site: Site) -> list[waiting.Waiting]:
    """Returns the plans that have come and wait still, as rules and decisions are now."""
    return [one for one in waiting.every(site) if approval.answer(site, one.plan).status == "waiting"]


def plan_named(site: Site, name: str) -> Plan:
    """Returns the plan in a file, or the one that waits or was decided about whose hash begins so.

    Raises:
        UserError: there is none, or several.
    """
    path = Path(name)
    if path.exists() or not PREFIX.fullmatch(name):
        return _read(path)
    known = [one.plan for one in waiting.every(site)] + [one.plan for one in decision.every(site)]
    found = {plan.hash: plan for plan in known if plan.hash.startswith(name)}
    if len(found) != 1:
        raise UserError(
            f"Expected one plan whose hash begins with {name}, found {len(found)}; "
            f"see: feverfew-client approve {site.directory}"
        )
    return next(iter(found.values()))


def decide(site: Site, plan: Plan, verdict: Verdict, *, reason: str, is_agreed: bool, as_json: bool) -> int:
    """Shows a plan, asks, and records the answer; returns the exit code, 1 where nothing was recorded.

    With ``as_json`` nobody is asked: without ``is_agreed`` the plan is only shown.

    Raises:
        UserError: nobody is there to be asked, or there is no approval to withdraw.
    """
    shown = proposal(site, plan)
    if not as_json:
        prospectus.show(shown, console=Console())
        if not is_agreed and not _is_yes(QUESTION[verdict]):
            print("nothing was recorded")
            return 1
    told = approval.decide(site, plan, verdict, reason=reason) if is_agreed or not as_json else None
    if as_json:
        tree = shown.to_tree() | {"decision": None if told is None else _tree(told)}
        print(json.dumps(tree, indent=2, allow_nan=False))
    else:
        print(f"{verdict} plan {plan.hash}")
    return 0


def _is_yes(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"Expected a person who is asked {question!r}, found no terminal; say --yes.")
    return input(f"{question} [yes/no] ").strip().lower() == "yes"


def _tree(told: Decision) -> dict[str, object]:
    """Returns plain values for JSON; the plan is named by its hash."""
    return told.model_dump(mode="json", exclude={"plan"}) | {"study": told.plan.study}


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Expected a readable file {path}, found: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Expected text in {path}, found something else.") from None
