"""The order in which anything private leaves a site: approval, charge on disk, work, reply on disk, sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from client import approval, replies
from client.files import private_directory
from client.ledger import Charge, Ledger, Outcome
from client.replies import Reply
from client.site import Site
from common.errors import Refusal
from common.exchange import Task
from common.plan import Plan
from common.privacy import Spend
from common.trail import Trail


def once(
    site: Site,
    plan: Plan,
    task: Task,
    *,
    part: str,
    spend: Spend | None,
    work: Callable[[], Reply],
) -> Reply:
    """Does a task at most once: charge, work, store; a repeated task gets the stored reply.

    A charge without outcome has released nothing: the work is done again under the same charge.

    Args:
        spend: what the reply will release; None where it releases nothing private.
        work: makes the reply; called at most once.

    Raises:
        Refusal: not approved, over budget, repeated too often, or released before and gone.
    """
    approval.require(site, plan)
    directory = private_directory(site.state) / "replies"
    if spend is None:
        return replies.load(directory, task.identity) or _stored(directory, task, work())
    with open_ledger(site) as ledger:
        charged = ledger.charge(_charge(site, plan, task, part, spend), max_repeats=site.settings.max_repeats)
        outcome = ledger.outcome(task.identity)
        if outcome is not None:
            return _released_before(directory, task, outcome)
        Trail(site.state / "events.jsonl").record(
            "charged" if charged else "charged_before", run=task.run, round=task.server_round, part=part
        )
        reply = replies.load(directory, task.identity)
        if reply is None:
            try:
                reply = _stored(directory, task, work())
            except Exception:
                ledger.finish(task.identity, Outcome(kind="failed", code="site_error"))
                raise
        ledger.finish(task.identity, Outcome(kind="stored", code=""))
        return reply


def _released_before(directory: Path, task: Task, outcome: Outcome) -> Reply:
    if outcome.kind == "failed":
        raise Refusal(outcome.code)
    reply = replies.load(directory, task.identity)
    if reply is None:
        raise Refusal("reply_gone", "the stored reply of a released task is missing; it is not made twice")
    return reply


def _stored(directory: Path, task: Task, reply: Reply) -> Reply:
    replies.store(directory, task.identity, reply)
    return reply


def _charge(site: Site, plan: Plan, task: Task, part: str, spend: Spend) -> Charge:
    return Charge(
        task=task.identity,
        run=task.run,
        plan_hash=plan.hash,
        study=plan.study,
        server_round=task.server_round,
        purpose=task.purpose,
        part=part,
        spend=spend,
        nominal_patients=site.settings.nominal_patients,
    )


@contextmanager
def open_ledger(site: Site) -> Iterator[Ledger]:
    """Opens the site's ledger, making it at the first use."""
    settings = site.settings
    path = private_directory(site.state) / "ledger.sqlite"
    ledger = Ledger(path, max_epsilon=settings.max_epsilon, delta=settings.delta)
    try:
        yield ledger
    finally:
        ledger.close()
