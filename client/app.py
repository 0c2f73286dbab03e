"""ClientApp: unpack, call, pack. The one place where errors are turned into what may leave a site."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from client import log, release, trail, work
from client.site import Site, open_site, site_directory, waits_for_disk
from common import durable, exchange, model, received
from common.errors import ConfigError, FeverfewError, LedgerError, Refusal, UnusableCase
from common.plan import Plan

logger = logging.getLogger("feverfew.site")
app = ClientApp()

INCOMPATIBLE = ("incompatible_plan", "malformed_task")
"""Codes of what another version wrote: a plan, or a task, that this one cannot read."""


@app.query("prepare")  # type: ignore[untyped-decorator]
def prepare(message: Message, context: Context) -> Message:
    """Answers whether this site takes part, with its public constants."""
    return _answer(message, context, "prepare", _prepare)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Trains one round; charged before it begins, stored before it is sent."""
    return _answer(message, context, "train", _train)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the global model; charged before it begins, stored before it is sent."""
    return _answer(message, context, "evaluate", _evaluate)


@app.query("landmarks")  # type: ignore[untyped-decorator]
def landmarks(message: Message, context: Context) -> Message:
    """Measures landmarks of intensity; charged before it begins, stored before it is sent."""
    return _answer(message, context, "landmarks", _landmarks)


@app.query("deliver")  # type: ignore[untyped-decorator]
def deliver(message: Message, context: Context) -> Message:
    """Keeps the final model."""
    return _answer(message, context, "deliver", _deliver)


def _prepare(site: Site, plan: Plan, task: exchange.Task) -> RecordDict:
    return exchange.prepared_record(work.prepare(site, plan, task))


def _train(site: Site, plan: Plan, task: exchange.Task) -> RecordDict:
    return exchange.update_record(work.train(site, plan, task, network=_network(plan.to_json())))


def _evaluate(site: Site, plan: Plan, task: exchange.Task) -> RecordDict:
    return exchange.scored_record(work.evaluate(site, plan, task, network=_network(plan.to_json())))


def _landmarks(site: Site, plan: Plan, task: exchange.Task) -> RecordDict:
    return exchange.scored_record(work.landmarks(site, plan, task))


def _deliver(site: Site, plan: Plan, task: exchange.Task) -> RecordDict:
    work.keep_model(site, plan, task, network=_network(plan.to_json()))
    return exchange.delivered_record()


def _answer(
    message: Message,
    context: Context,
    purpose: exchange.Purpose,
    do: Callable[[Site, Plan, exchange.Task], RecordDict],
) -> Message:
    """Runs a task; whatever goes wrong leaves as a constant code. Texts of ours, which name no case, stay in
    the site's log, and all others in ``private/errors.log``."""
    with durable.waiting(waits_for_disk(context.node_config)):
        return _answered(message, context, purpose, do)


def _answered(
    message: Message,
    context: Context,
    purpose: exchange.Purpose,
    do: Callable[[Site, Plan, exchange.Task], RecordDict],
) -> Message:
    site = None
    try:
        site = open_site(site_directory(context.node_config))
        task = exchange.read_task(message.content)
        plan = _plan(str(context.run_config["plan"]))
        if task.plan_hash != plan.hash or task.run != context.run_config["run"]:
            raise Refusal("other_plan")
        if task.purpose != purpose:
            raise Refusal("malformed_task", f"expected a task to {purpose}")
        fields = {"run": task.run, "plan_hash": plan.hash, "round": task.server_round, "part": task.part}
        if task.purpose == "prepare":
            work.sign_what_others_left(site, run=task.run)
        trail.record(site, "received", purpose=task.purpose, **fields)
        content = do(site, plan, task)
        release.attach_ledger_head(site, content)
    except LedgerError as error:
        logger.error("%s", error)
        content = exchange.refusal_record("ledger_broken")
    except Refusal as refusal:
        logger.info("declined: %s", refusal)
        content = _incompatible(site, message, refusal.code) or exchange.refusal_record(refusal.code)
    except ConfigError as error:
        logger.error("incompatible plan: %s", error)
        told = _incompatible(site, message, "incompatible_plan")
        content = told or exchange.refusal_record("incompatible_plan")
    except UnusableCase as error:
        logger.error("a case cannot be used: %s", error.code)  # its text may name the file
        content = exchange.refusal_record("site_error")
    except FeverfewError as error:
        logger.error("%s", error)
        content = exchange.refusal_record("site_error")
    except Exception as error:
        logger.exception("task failed; private/%s says more", log.ERRORS)
        if site is not None:
            log.keep_error(site, error)
        content = exchange.refusal_record("site_error")
    _note_refusal(site, content)
    return Message(content, reply_to=message)


def _note_refusal(site: Site | None, content: RecordDict) -> None:
    if site is not None and "refused" in content:
        code = received.part(content, "refused", ConfigRecord)["code"]
        trail.record_if_possible(site, "refused", code=code)


def _incompatible(site: Site | None, message: Message, code: str) -> RecordDict | None:
    """A site that is asked to prepare what it cannot read says so as it says all else before round 1."""
    is_asked = message.metadata.message_type == exchange.PREPARE
    if site is None or not is_asked or code not in INCOMPATIBLE:
        return None
    return exchange.prepared_record(work.prepared(site, status="incompatible", reason=code))


@lru_cache(maxsize=4)
def _plan(text: str) -> Plan:
    return Plan.from_json(text)


@lru_cache(maxsize=4)
def _network(text: str) -> nn.Module:
    """One network per plan and process; its parameters are overwritten by every task."""
    return model.build(_plan(text))
