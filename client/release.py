"""The order in which anything private leaves a site: approval, charge on disk, work, reply on disk, sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flwr.app import RecordDict

from client import approval, replies, trail
from client.files import private_directory
from client.journal import CLAIM_SUFFIX, REMEDY, known_head
from client.ledger import Charge, Ledger, Outcome
from client.replies import Reply
from client.site import Site
from common import durable, exchange, keys
from common.chain import Head
from common.errors import LedgerError, Refusal, StateError
from common.exchange import Task
from common.keys import PrivateKey
from common.plan import Plan
from common.privacy import Spend

PURPOSES: Final = {"train": "training", "evaluate": "evaluation", "landmarks": "landmarks"}
"""What a task asks for, in the words of the ledger."""


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

    A charge without outcome has released nothing: the work is done again under the same charge. Two
    processes of a site never work at the same time, or both could make a reply to one task.

    Args:
        spend: what the reply will release; None where it releases nothing private.
        work: makes the reply; called at most once.

    Raises:
        Refusal: not approved, over budget, repeated too often, or released before and gone.
        LedgerError: the ledger is broken; nothing is released until it is restored.
    """
    approval.require(site, plan)
    directory = _replies(site, is_exact=spend is None)
    if spend is None:
        return _exact(directory, task, work)
    with durable.locked(site.state / "task.lock"), open_ledger(site) as ledger:
        approval.keep(site, plan)  # before the charge: a restoration must know what it was for
        charged = ledger.charge(_charge(site, plan, task, part, spend), max_repeats=site.settings.max_repeats)
        outcome = ledger.outcome(task.identity)
        if outcome is not None:
            return _released_before(directory, task, outcome)
        trail.record(
            site,
            "charged" if charged else "charged_before",
            run=task.run,
            round=task.server_round,
            part=part,
            task=task.identity,
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


def make_folder(site: Site, *, is_exact: bool) -> None:
    """Makes the folder of the replies before the first task, which waits for it less."""
    _replies(site, is_exact=is_exact).mkdir(parents=True, exist_ok=True)


def _replies(site: Site, *, is_exact: bool) -> Path:
    return private_directory(site.state) / ("exact_replies" if is_exact else "replies")


def _exact(directory: Path, task: Task, work: Callable[[], Reply]) -> Reply:
    """Returns a reply that nothing is charged for: the stored one, or where it is gone or damaged another.

    Nobody is harmed by a second one, so the disk is not waited for.
    """
    with contextlib.suppress(StateError):
        stored = replies.load(directory, task.identity)
        if stored is not None:
            return stored
    reply = work()
    replies.store(directory, task.identity, reply, is_durable=False)
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
        purpose=PURPOSES[task.purpose],
        part=part,
        spend=spend,
        nominal_patients=site.settings.nominal_patients,
    )


@contextmanager
def open_ledger(site: Site) -> Iterator[Ledger]:
    """Opens the site's ledger, making it at the first use.

    Raises:
        LedgerError: it is broken, shorter than it was, or gone.
    """
    settings = site.settings
    path = ledger_path(site)
    if not path.exists() and not head_path(site).exists() and not _is_new(site):
        raise LedgerError(
            f"Expected the ledger {path} of the replies and plans that are kept here, found none; {REMEDY}"
        )
    private_directory(site.state)
    ledger = Ledger(
        path,
        head=head_path(site),
        key=_key(site),
        max_epsilon=settings.max_epsilon,
        delta=settings.delta,
        study_budgets={budget.study: budget.max_epsilon for budget in settings.study_budgets},
    )
    try:
        yield ledger
    finally:
        ledger.close()


def ledger_head(site: Site) -> Head | None:
    """Returns the last row of the site's ledger, for coordinators to remember; None before the first use."""
    if _is_new(site):
        return None
    if ledger_path(site).exists():
        known = known_head(ledger_path(site), head=head_path(site), key=_key(site))
        if known is not None:
            return known
    with open_ledger(site) as ledger:
        return ledger.head


def attach_ledger_head(site: Site, content: RecordDict) -> None:
    """Adds the last row of the ledger to a reply; a broken one has none that anybody should remember."""
    with contextlib.suppress(LedgerError):
        head = ledger_head(site)
        if head is not None:
            exchange.attach_head(content, head)


def _key(site: Site) -> PrivateKey:
    return keys.own(site.private / "site.key")


def _is_new(site: Site) -> bool:
    """Says whether this site never had a ledger; every reply and every plan that is kept here was charged."""
    has_replies = any((site.state / "replies").glob("*"))
    has_ledger = ledger_path(site).exists() or head_path(site).exists()
    return not (has_ledger or has_replies or approval.has_worked(site))


def ledger_path(site: Site) -> Path:
    """Returns the file of the ledger."""
    return site.state / "ledger.sqlite"


def head_path(site: Site) -> Path:
    """Returns the file that remembers the last row; beside the state, so that a copy of one misses it."""
    return site.state.with_name("ledger.head")


def claim_path(site: Site) -> Path:
    """Returns the file that notes a head that a coordinator presented and this site never signed."""
    return head_path(site).with_suffix(CLAIM_SUFFIX)
