"""experiment=attack: tries to break the promise of the ledger, and shows how far that got."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from client.cohort import Part, open_cohort
from client.site import open_site
from common.errors import ConfigError, DataError
from common.plan import Plan
from server.page import number, percent, upward
from simulations import attack_page, auditor, inversion, membership
from simulations.auditor import Audit
from simulations.implementation import PRODUCT
from simulations.inversion import Inversion
from simulations.membership import Membership
from simulations.settings import Attack, Settings

JSON_NAME, HTML_NAME, PICTURE_NAME = "attack.json", "attack.html", "inversion.png"


_IMAGES = ("original", "recovered_without_privacy", "recovered_with_privacy")


@dataclass(frozen=True, kw_only=True)
class AttackReport:
    """What the attacks found."""

    study: str
    plan_hash: str
    seeded: bool
    audit: Audit
    membership: Membership | None
    inversion: Inversion | None

    def to_json(self) -> str:
        """Returns the report as JSON, indented; images are in the page alone."""
        tree: dict[str, Any] = asdict(replace(self, inversion=None))
        if self.inversion is not None:
            found = asdict(self.inversion)
            tree["inversion"] = {name: value for name, value in found.items() if name not in _IMAGES}
        tree["audit"]["passed"] = self.audit.passed
        for written, check in zip(tree["audit"]["checks"], self.audit.checks, strict=True):
            written["passed"] = check.passed
        return json.dumps(tree, indent=2) + "\n"

    def comparisons(self) -> Iterator[tuple[str, str, str]]:
        """Yields what the other attacks reached: what it is, with privacy, without."""
        if self.membership is not None:
            private, plain = self.membership.private, self.membership.none
            for name, one, other in (
                ("loss", private.loss_threshold, plain.loss_threshold),
                ("likelihood ratio", private.likelihood_ratio, plain.likelihood_ratio),
            ):
                yield f"membership by {name}: AUC", number(one.auc), number(other.auc)
                found = percent(one.tpr_at_1_percent), percent(other.tpr_at_1_percent)
                yield f"membership by {name}: TPR at 1 % FPR", *found
        if self.inversion is not None:
            private_image, plain_image = self.inversion.with_privacy, self.inversion.without_privacy
            likenesses = number(private_image.correlation), number(plain_image.correlation)
            yield "gradient inversion: correlation", *likenesses

    def write(self, directory: Path) -> None:
        """Writes ``attack.json``, ``attack.html`` and, if an image was recovered, ``inversion.png``."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / JSON_NAME).write_text(self.to_json(), encoding="utf-8")
        drawn = None
        if self.inversion is not None:
            inversion.picture(self.inversion, directory / PICTURE_NAME)
            drawn = (directory / PICTURE_NAME).read_bytes()
        (directory / HTML_NAME).write_text(attack_page.render(self, picture=drawn), encoding="utf-8")


def require_attackable(plan: Plan, settings: Settings) -> None:
    """Checks that nothing was asked for that an attack would not do.

    Raises:
        ConfigError: a setting that would have no effect.
    """
    asked = plan.evaluation
    refused = [
        (settings.engine.name != "local", "engine=local", f"engine={settings.engine.name}"),
        (settings.engine.workers is not None, "engine.workers=null", "workers, of which there are none"),
        (settings.resume, "resume=false", "resume=true"),
        (asked.validation_every > 0, "plan.evaluation.validation_every=0", "an evaluation"),
        (plan.landmarks is not None, "a plan that trains", "plan.landmarks"),
        (asked.test_at_end, "plan.evaluation.test_at_end=false", "an evaluation"),
    ]
    for is_wrong, expected, found in refused:
        if is_wrong:
            raise ConfigError(
                f"Expected {expected} with experiment=attack, found {found}; leave the setting out."
            )


def training_parts(sites: Sequence[Path], plan: Plan) -> list[Part]:
    """Returns the patients that each training site has for training.

    Raises:
        DataError: no site has any.
    """
    opened = [site for site in map(open_site, sites) if site.settings.role == "training"]
    cohorts = [open_cohort(site, asked=plan.asked) for site in opened]
    parts = [cohort.parts["train"] for cohort in cohorts if cohort.parts["train"].patients]
    if not parts:
        raise DataError("Expected sites with patients to train on, found none; see feverfew-client check.")
    return parts


def run(plan: Plan, sites: Sequence[Path], *, attack: Attack, directory: Path) -> AttackReport:
    """Tries all attacks on the product and returns the report, which is also written.

    Raises:
        ConfigError: more canaries than parameters; a privacy target that cannot be reached.
        DataError: a site cannot be used.
    """
    parts = training_parts(sites, plan)
    with _progress() as bars:
        report = AttackReport(
            study=plan.study,
            plan_hash=plan.hash,
            seeded=plan.randomness == "seeded",
            audit=auditor.run(
                plan, parts, attack=attack, implementation=PRODUCT, on_round=_bar(bars, "audit")
            ),
            membership=None
            if attack.membership is None
            else membership.run(plan, trial=attack.membership, on_model=_bar(bars, "membership inference")),
            inversion=None
            if attack.inversion is None
            else inversion.run(plan, trial=attack.inversion, on_step=_bar(bars, "gradient inversion")),
        )
    report.write(directory)
    return report


def _progress() -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True))


def _bar(bars: Progress, name: str) -> Callable[[int, int], None]:
    """Returns what takes (done, total) and moves a bar of that name."""
    task = bars.add_task(name, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def show(report: AttackReport, *, directory: Path) -> None:
    """Prints what was found and where the files are."""
    console = Console()
    console.print(summary_table(report))
    if report.membership is not None or report.inversion is not None:
        console.print(comparison_table(report))
    console.print(f"report: {directory / HTML_NAME}", highlight=False, soft_wrap=True)


def summary_table(report: AttackReport) -> Table:
    """Returns the ledger's bound, what was proved of it, and the tests of the mechanism."""
    audit = report.audit
    verdict = "nothing found against the ledger" if audit.passed else "THE LEDGER IS WRONG"
    table = Table(title=Text(f"{report.study}: {verdict}", style="" if audit.passed else "bold red"))
    table.add_column("what", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    allowed = f"<= {upward(audit.ledger_epsilon)}"
    for finding in audit.findings:
        table.add_row(f"epsilon from the {finding.seen}", f">= {number(finding.lower_bound, 2)}", allowed)
    for check in audit.checks:
        sign = ">=" if check.at_least else "<="
        mark = "" if check.passed else " FAILED"
        table.add_row(f"test of {check.name}{mark}", f"{check.measured:.3g}", f"{sign} {check.limit:.4g}")
    return table


def comparison_table(report: AttackReport) -> Table:
    """Returns what the other attacks reached with privacy and without."""
    table = Table()
    table.add_column("attack", no_wrap=True)
    for name in ("private", "privacy=none"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.comparisons():
        table.add_row(*row)
    return table
