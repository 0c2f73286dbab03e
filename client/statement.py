"""What the ledger says, to the hospital's own people: spent and left by study, and what a plan would cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from client import release
from client.cost import planned_spends
from client.ledger import Ledger
from client.site import Site
from common.chain import Head
from common.errors import Refusal
from common.plan import Plan
from common.privacy import epsilon


@dataclass(frozen=True, kw_only=True)
class RunStatement:
    """What one run cost alone. ``charges`` counts rows."""

    run: str
    plan_hash: str
    epsilon: float
    charges: int


@dataclass(frozen=True, kw_only=True)
class StudyStatement:
    """What one study cost alone; ``max_epsilon`` and ``left`` are None where it has no budget of its own."""

    study: str
    epsilon: float
    max_epsilon: float | None
    left: float | None
    runs: tuple[RunStatement, ...]


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What a plan would cost alone, and where it would bring the ledger. ``reason``: "" if it fits."""

    plan_hash: str
    study: str
    epsilon: float
    total_epsilon: float
    study_epsilon: float
    fits: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The state of a ledger. ``left`` is budget minus epsilon; epsilons compose to less than their sum, so
    more than ``left`` may fit."""

    site: str
    delta: float
    max_epsilon: float
    epsilon: float
    accountant: str
    left: float
    parts: dict[str, float]
    studies: tuple[StudyStatement, ...]
    charges: int
    head: Head
    what_if: WhatIf | None

    def to_json(self) -> str:
        """Returns the statement as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def statement(site: Site, *, what_if: Plan | None = None) -> Statement:
    """Reads the ledger, and checks every signature in it.

    Raises:
        LedgerError: the ledger is broken.
        PrivacyTargetError: no noise makes the plan of ``what_if`` possible here.
    """
    settings = site.settings
    with release.open_ledger(site) as ledger:
        ledger.verify_signatures()
        spent = ledger.spent()
        runs = ledger.runs()
        histories = ledger.histories()
        return Statement(
            site=site.name,
            delta=settings.delta,
            max_epsilon=settings.max_epsilon,
            epsilon=spent.value,
            accountant=spent.accountant,
            left=max(0.0, settings.max_epsilon - spent.value),
            parts={part: epsilon(history, delta=settings.delta).value for part, history in histories.items()},
            studies=tuple(
                _study(site, ledger, study=study, runs=[run for run in runs if run[0] == study])
                for study in dict.fromkeys(run[0] for run in runs)
            ),
            charges=sum(count for *_, count in runs),
            head=ledger.head,
            what_if=None if what_if is None else _what_if(site, ledger, what_if),
        )


def _study(
    site: Site, ledger: Ledger, *, study: str, runs: list[tuple[str, str, str, int]]
) -> StudyStatement:
    limits = {budget.study: budget.max_epsilon for budget in site.settings.study_budgets}
    spent, limit = ledger.spent(study=study).value, limits.get(study)
    return StudyStatement(
        study=study,
        epsilon=spent,
        max_epsilon=limit,
        left=None if limit is None else max(0.0, limit - spent),
        runs=tuple(
            RunStatement(run=run, plan_hash=plan, epsilon=ledger.spent(run=run).value, charges=charges)
            for _, run, plan, charges in runs
        ),
    )


def _what_if(site: Site, ledger: Ledger, plan: Plan) -> WhatIf:
    spends = planned_spends(site, plan)
    alone, total = ledger.projected(spends)
    _, in_study = ledger.projected(spends, study=plan.study)
    reason = ""
    try:
        ledger.require_affordable(spends, study=plan.study)
    except Refusal as refusal:
        reason = str(refusal)
    return WhatIf(
        plan_hash=plan.hash,
        study=plan.study,
        epsilon=alone.value,
        total_epsilon=total.value,
        study_epsilon=in_study.value,
        fits=not reason,
        reason=reason,
    )


def show(told: Statement, *, console: Console) -> None:
    """Prints a statement as a table."""
    table = Table(title=f"privacy ledger of {told.site}: epsilon at delta {told.delta:g}, for a patient")
    for name in ("study", "run", "plan"):
        table.add_column(name, overflow="fold")
    for name in ("charges", "epsilon", "budget", "left"):
        table.add_column(name, justify="right")
    for study in told.studies:
        limit, left = _number(study.max_epsilon), _number(study.left)
        charges = str(sum(run.charges for run in study.runs))
        table.add_row(study.study, "all runs", "", charges, _number(study.epsilon), limit, left)
        for run in study.runs:
            table.add_row("", run.run, run.plan_hash[:12], str(run.charges), _number(run.epsilon), "", "")
        table.add_section()
    table.add_row(
        *("all studies", "", "", str(told.charges), _number(told.epsilon)),
        *(_number(told.max_epsilon), _number(told.left)),
        style="bold",
    )
    console.print(table)
    console.print(
        "Epsilons compose: what is spent is less than the sum of the runs, and more than 'left' may fit."
    )
    console.print(f"{told.head.number} rows, every signature valid; computed with {told.accountant}.")
    if told.what_if is not None:
        plan = told.what_if
        answer = "It fits." if plan.fits else f"It does not fit. {plan.reason}"
        console.print(
            f"Plan {plan.plan_hash[:12]} would cost epsilon {plan.epsilon:.3f}; the ledger would be at "
            f"{plan.total_epsilon:.3f} of {told.max_epsilon:g}, study {plan.study} at "
            f"{plan.study_epsilon:.3f}. {answer}",
            markup=False,
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
