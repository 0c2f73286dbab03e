"""A round on the hospital's own data that sends nothing and shows every field that would leave."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from rich.console import Console
from rich.table import Table

from client import course, release, work
from client.cost import planned_spends
from client.policies import EVERY_PLAN
from client.site import Site
from common import exchange, model
from common.arrays import unpacked
from common.exchange import Prepared, Task
from common.plan import Plan

_SHOWN_VALUES = 6


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of one message that would leave: ``value`` as it would be sent, long arrays cut."""

    message: str
    field: str
    kind: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a plan would do here: whether the site takes part, what leaves, and what a whole run costs."""

    plan_hash: str
    status: str
    reason: str
    run_epsilon: float
    total_epsilon: float
    budget: float
    fields: tuple[Field, ...]

    def to_json(self) -> str:
        """Returns the rehearsal as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def rehearse(site: Site, plan: Plan) -> Rehearsal:
    """Runs one round and one evaluation of every part on a copy of the site's state.

    Guarantee: nothing is sent and nothing is charged: ledger, replies, trail and the records of runs are
    copies. What any look at the data makes anew is made: the cache, ``private/quarantine.csv``, and the
    frozen list of a site that has none yet. The updates that are shown are drawn with fresh noise; who sees
    this page sees the hospital's data as the coordinator would, so it stays at the hospital.
    """
    with tempfile.TemporaryDirectory(prefix="feverfew-rehearsal-") as place:
        rehearsed = _on_a_copy(site, Path(place))
        with release.open_ledger(rehearsed) as ledger:  # before the round below is charged to the copy
            run, total = ledger.projected(planned_spends(site, plan))
        prepared, records = _messages(rehearsed, plan)
    return Rehearsal(
        plan_hash=plan.hash,
        status=prepared.status,
        reason=prepared.reason,
        run_epsilon=run.value,
        total_epsilon=total.value,
        budget=site.settings.max_epsilon,
        fields=tuple(field for name, record in records for field in fields(name, record)),
    )


def show(rehearsal: Rehearsal, *, console: Console) -> None:
    """Prints a rehearsal as a table."""
    table = Table(title=f"what would leave under plan {rehearsal.plan_hash[:12]}; nothing was sent")
    for name in ("message", "field", "kind", "value"):
        table.add_column(name, overflow="fold")
    for field in rehearsal.fields:
        table.add_row(field.message, field.field, field.kind, field.value)
    console.print(table)
    answer = rehearsal.status + (f" ({rehearsal.reason})" if rehearsal.reason else "")
    console.print(f"this site would answer: {answer}", markup=False)
    console.print(
        f"a whole run would cost epsilon {rehearsal.run_epsilon:.2f}; the ledger would then be at "
        f"{rehearsal.total_epsilon:.2f} of {rehearsal.budget:g}",
        markup=False,
    )


def fields(message: str, record: RecordDict) -> Iterator[Field]:
    """Yields every field of a message's content."""
    for name, part in record.items():
        for key, value in part.items():
            if isinstance(part, ArrayRecord):
                array = unpacked(value)
                kind = f"{array.dtype} {array.shape}"
                shown = ", ".join(f"{number:.4g}" for number in array.reshape(-1)[:_SHOWN_VALUES])
                text = shown + (", ..." if array.size > _SHOWN_VALUES else "")
            else:
                kind, text = type(value).__name__, value.hex() if isinstance(value, bytes) else str(value)
            yield Field(message=message, field=f"{name}.{key}", kind=kind, value=text)


def _on_a_copy(site: Site, place: Path) -> Site:
    refusing = [policy for policy in site.settings.policies if policy.decision == "refuse"]
    settings = site.settings.model_copy(update={"policies": (*refusing, EVERY_PLAN)})
    copy = replace(site, settings=settings, records=place)
    copy.state.mkdir()
    for path in (release.head_path, release.ledger_path):  # in this order: the head is never ahead
        if path(site).exists():
            shutil.copy(path(site), path(copy))
    return copy


def _messages(site: Site, plan: Plan) -> tuple[Prepared, list[tuple[str, RecordDict]]]:
    network = model.build(plan)
    task = Task(
        run="rehearsal",
        plan_hash=plan.hash,
        server_round=1,
        purpose="train",
        part="",
        parameters=model.flatten(network),
    )
    prepared = work.prepare(site, plan, task)
    records = [("prepare", exchange.prepared_record(prepared))]
    if prepared.status == "approved" and plan.landmarks is not None:
        asked = replace(task, purpose="landmarks", parameters=np.zeros(0, np.float32))
        if site.settings.role == "training":
            records.append(("landmarks", exchange.scored_record(work.landmarks(site, plan, asked))))
    elif prepared.status == "approved":
        if site.settings.role == "training":
            update = work.train(site, plan, task, network=network)
            records.append(("train", exchange.update_record(update)))
        for part in site.settings.split.parts:
            for server_round in course.rounds_of(plan, purpose="evaluate", part=part)[:1]:
                asked = replace(task, purpose="evaluate", part=part, server_round=server_round)
                scored = work.evaluate(site, plan, asked, network=network)
                records.append((f"evaluate {part}", exchange.scored_record(scored)))
        records.append(("deliver", exchange.delivered_record()))
    for _, record in records:
        release.attach_ledger_head(site, record)
    return prepared, records
