"""What ``feverfew-client check`` tells besides the data: connection, budget, and what a plan would cost."""

from __future__ import annotations

import httpx

from client import coordinator, table
from client.check import Line
from client.release import open_ledger
from client.site import Site
from client.table import Case
from client.work import planned_spends
from common import keys
from common.config import compose_plan
from common.errors import Refusal, UserError
from common.plan import Plan, Preprocessing

TIMEOUT_SECONDS = 10.0
REFUSED = 403
"""What the gateway says to whoever asks for anything but its nine paths: so it is the gateway."""


def lines(site: Site, plan: Plan | None) -> list[Line]:
    """Returns all that is told beside the data."""
    told = [connection_line(site), budget_line(site)]
    return told if plan is None else [*told, plan_line(site, plan)]


def budget_line(site: Site) -> Line:
    """Returns what the ledger has left; a site that never released anything has all of it."""
    settings = site.settings
    spent = 0.0
    if (site.state / "ledger.sqlite").exists():
        with open_ledger(site) as ledger:
            spent = ledger.spent().value
    text = f"epsilon {spent:.2f} of {settings.max_epsilon:g} spent, at delta {settings.delta:g}"
    return Line(name="budget", text=text, level="ok" if spent < settings.max_epsilon else "error")


def plan_line(site: Site, plan: Plan) -> Line:
    """Says what a run of the plan would cost, and whether this site can and may pay it."""
    try:
        spends = planned_spends(site, plan)
        with open_ledger(site) as ledger:
            alone, total = ledger.projected(spends)
            ledger.require_affordable(spends, study=plan.study)
    except (UserError, Refusal) as error:
        return Line(name="plan", text=f"this site would decline: {error}", level="error")
    text = f"a run would cost epsilon {alone.value:.2f}; the ledger would then be at {total.value:.2f}"
    return Line(name="plan", text=text, level="ok")


def connection_line(site: Site) -> Line:
    """Tries to reach the coordinator's gateway, without saying who asks."""
    name = "connection"
    try:
        invitation = coordinator.open_coordinator(site.directory)
    except UserError as error:
        return Line(name=name, text=str(error), level="warning")
    tls = keys.trust_only(invitation.certificate)
    try:
        answer = httpx.get(f"https://{invitation.address}/", verify=tls, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        text = f"{invitation.address} is not reached over TLS ({error or type(error).__name__})"
        return Line(name=name, text=text, level="error")
    if answer.status_code != REFUSED:
        text = f"{invitation.address} answers as no gateway does (status {answer.status_code})"
        return Line(name=name, text=text, level="error")
    return Line(name=name, text=f"{invitation.address} is reached over TLS")


def usual_preprocessing() -> Preprocessing:
    """Returns the preprocessing of ``conf/``, for a check before any plan is known."""
    return compose_plan(["plan.classes=[a,b]", "plan.sites=1", "plan.quorum=1"]).preprocessing


def labels(site: Site) -> tuple[str, ...]:
    """Returns the labels that stand in the case table, sorted.

    Raises:
        DataError: the case table cannot be used.
    """
    rows = table.rows(site.table, patient_is=site.settings.patient_is)
    return tuple(sorted({row.label for row in rows if isinstance(row, Case)}))
