"""What a hospital can say of one patient: cases in the cohort, runs that used them, withdrawal.

Nothing of this leaves the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client import frozen, split, usage, withdrawal
from client.case import Case
from client.site import Site
from client.usage import Use

MODEL = "A trained model is not untrained by a withdrawal; see docs/withdrawal.md."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the site knows of a patient.

    Attributes:
        cases: number of cases in the frozen cohort; where it has none, in the listing as it is now.
        withdrawn: since when (UTC); ``None`` for who is not.
        uses: the runs that used the patient's cases.
    """

    patient: str
    cases: int
    withdrawn: datetime | None
    uses: tuple[Use, ...]

    @property
    def is_known(self) -> bool:
        """Whether a list or a run of the site has the patient."""
        return self.cases > 0 or bool(self.uses)

    def to_tree(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "patient": self.patient,
            "known": self.is_known,
            "cases": self.cases,
            "withdrawn": None if self.withdrawn is None else self.withdrawn.isoformat(),
            "runs": [{**vars(use), "first_used": use.first_used.isoformat()} for use in self.uses],
        }


def standing(site: Site, *, patient: str) -> Standing:
    """Returns what the site knows of a patient.

    Raises:
        UserError, StateError: lists or records of the site cannot be read.
    """
    return Standing(
        patient=patient,
        cases=_num_cases(site, patient),
        withdrawn=withdrawal.withdrawn(site).get(patient),
        uses=usage.find(site, patient=patient),
    )


def report(site: Site, patient: str, *, as_json: bool) -> int:
    """Prints what the site knows of a patient; returns the exit code, 1 for a patient it does not know."""
    found = standing(site, patient=patient)
    console = Console()
    if as_json:
        console.print_json(data=found.to_tree())
    else:
        show(found, console=console)
    return 0 if found.is_known else 1


def report_withdrawn(site: Site, *, as_json: bool) -> int:
    """Prints who is withdrawn, and since when."""
    since = withdrawal.withdrawn(site)
    console = Console()
    if as_json:
        console.print_json(data={patient: time.isoformat() for patient, time in since.items()})
        return 0
    table = Table(title=f"withdrawn: {len(since)}", title_justify="left")
    table.add_column("patient", overflow="fold")
    table.add_column("since (UTC)")
    for patient, time in since.items():
        table.add_row(escape(patient), f"{time:%Y-%m-%d %H:%M}")
    console.print(table)
    return 0


def show(found: Standing, *, console: Console) -> None:
    """Prints what the site knows of a patient."""
    if not found.is_known:
        text = "not known: no frozen cohort, listing or run of this site has this patient; check the spelling"
        console.print(text, markup=False, soft_wrap=True)
        if found.withdrawn is not None:
            console.print("the withdrawal is kept, and holds should they be listed later", markup=False)
        return
    told = (
        "not withdrawn"
        if found.withdrawn is None
        else f"withdrawn since {found.withdrawn:%Y-%m-%d %H:%M} UTC"
    )
    console.print(f"cases: {found.cases}; {told}", markup=False)
    if not found.uses:
        console.print("no run used them", markup=False)
        return
    console.print(_uses_table(found))
    console.print(MODEL, markup=False, soft_wrap=True)


def _uses_table(found: Standing) -> Table:
    table = Table(title="runs that used this patient's cases", title_justify="left")
    for name in ("run", "part", "cases", "first used (UTC)", "plan", "cohort"):
        table.add_column(name, justify="right" if name == "cases" else "left", overflow="fold")
    for use in found.uses:
        when = f"{use.first_used:%Y-%m-%d %H:%M}"
        shown = (use.plan_hash[:12], use.cohort_version[:12])
        table.add_row(escape(use.run), use.part, str(use.cases), when, *shown)
    return table


def _num_cases(site: Site, patient: str) -> int:
    listed = frozen.read(site, secret=split.read_key(site))
    count = 0 if listed is None else sum(one.case.patient == patient for one in listed.cases)
    if count:
        return count
    return sum(isinstance(row, Case) and row.patient == patient for row in frozen.listed_rows(site))
