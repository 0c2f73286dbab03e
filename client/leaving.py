"""Everything that a plan makes leave this site, field by field, in the words of ``docs/privacy.md``.

A test compares it with real messages and with the table there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from client.site import Site
from common import measure
from common.plan import NoPrivacy, Plan

CONSTANT: Final = "constant"
GAUSSIAN: Final = "Gaussian"
FOLLOWS: Final = "follows from tasks and settings"
CODED: Final = "see there"


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """One field of one message: what it is, and what protects it."""

    message: str
    field: str
    what: str
    mechanism: str


def leaving(site: Site, plan: Plan) -> list[Leaving]:
    """Returns all fields that would leave this site under a plan."""
    messages = ["prepare"]
    fields = [*_PREPARE]
    if site.settings.role == "training":
        fields += _training(plan) if plan.landmarks is None else _landmarks(plan)
        messages.append("train" if plan.landmarks is None else "landmarks")
    if evaluated := list(_evaluation(site, plan)):
        fields += evaluated
        messages.append("evaluate")
    if plan.landmarks is None:
        fields += _DELIVER
        messages.append("deliver")
    fields += [_leaving(message, *row) for message in messages for row in _LEDGER]
    return [*fields, *_WITHOUT_WORK]


def sends_exact_scores(plan: Plan, *, data: str) -> bool:
    """Says whether a site sends exact scores: without privacy, or where the site's data are public."""
    return isinstance(plan.privacy, NoPrivacy) or data == "public"


def _leaving(message: str, field: str, what: str, mechanism: str) -> Leaving:
    return Leaving(message=message, field=field, what=what, mechanism=mechanism)


def _training(plan: Plan) -> Iterator[Leaving]:
    is_exact = isinstance(plan.privacy, NoPrivacy)
    for field, what, mechanism in _TRAIN:
        if field == "arrays.scales" and plan.exchange.update == "fp32":
            continue
        yield _leaving("train", field, what, "none" if is_exact and mechanism != CONSTANT else mechanism)


def _landmarks(plan: Plan) -> Iterator[Leaving]:
    what = "for each of m landmarks, how many patients have it in which bin; exact with `privacy=none`"
    mechanism = "none" if isinstance(plan.privacy, NoPrivacy) else GAUSSIAN
    yield _leaving("landmarks", "arrays.landmarks", what, mechanism)
    yield _leaving("landmarks", "metrics.server-round", "echo of the task", CONSTANT)


def _evaluation(site: Site, plan: Plan) -> Iterator[Leaving]:
    parts = {"validation": bool(plan.validation_rounds), "test": plan.evaluation.test_at_end}
    if not any(is_asked and part in site.settings.split.parts for part, is_asked in parts.items()):
        return
    exact = sends_exact_scores(plan, data=site.settings.data)
    for name in measure.arrays_of(plan.asked, bins=plan.evaluation.bins, exact=exact):
        yield _leaving("evaluate", f"arrays.{name}", *_EVALUATE[name])
    yield _leaving("evaluate", "metrics.server-round", "echo of the task", CONSTANT)


_PREPARE: Final = [
    _leaving("prepare", f"reply.{field}", what, mechanism)
    for field, what, mechanism in (
        ("site", "enrolled name", CONSTANT),
        (
            "status",
            "approved, waiting, declined or incompatible",
            "decided by plan, settings, approval and ledger; declined also where the frozen cohort cannot be "
            "used",
        ),
        ("reason", "a code of the table below, empty when approved", "the same"),
        ("role", "training or evaluation", CONSTANT),
        ("data", "private or public", CONSTANT),
        ("nominal_patients", 'see "Public constants"', CONSTANT),
        ("patient_is", "column or case", CONSTANT),
        ("parts", "the parts that the site has", CONSTANT),
        ("feverfew", "installed version", CONSTANT),
    )
]
_TRAIN: Final = (
    (
        "arrays.update",
        "change of all parameters, one flat array",
        "Poisson-subsampled Gaussian",
    ),
    (
        "arrays.scales",
        "unless `exchange.update` is fp32: the scale of each block of the update, which was noised before",
        "Poisson-subsampled Gaussian",
    ),
    ("metrics.server-round", "echo of the task", CONSTANT),
    (
        "metrics.weight",
        "1 or `nominal_patients`; with `privacy=none` it may be the exact number of patients",
        CONSTANT,
    ),
    (
        "metrics.train-loss",
        "mean bounded loss of the round",
        "Gaussian, of one release with the update",
    ),
)
_EVALUATE: Final = {
    "histogram": ("scores by head, class and bin", GAUSSIAN),
    "sums": (
        "masks: for each class the sum of patients' Dice less 1/2, and the number of patients",
        GAUSSIAN,
    ),
    "dice": ("masks: exact Dice of every patient; only with `privacy=none` or public data", "none"),
    "scores": ("exact scores; only with `privacy=none` or public data", "none"),
    "targets": ("their labels; only with `privacy=none` or public data", "none"),
    "weights": ("their weights; only with `privacy=none` or public data", "none"),
}
_DELIVER: Final = [_leaving("deliver", "delivered.delivered", "the final model has arrived", CONSTANT)]
_LEDGER: Final = (
    ("ledger.number", "last row of the ledger", FOLLOWS),
    ("ledger.hash", "its hash, over tasks, plans, charges and times", FOLLOWS),
    ("ledger.signature", "the site's signature of both", FOLLOWS),
)
_WITHOUT_WORK: Final = [
    _leaving("refused", "refused.code", "a code of the table below", CODED),
    _leaving("error", "error.code", "Flower's number for the same", CODED),
    _leaving("error", "error.reason", "a code of the table below", CODED),
]
