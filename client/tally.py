"""What a run found at the site: ``private/runs/<run>/cohort.json``. It never leaves the site.

An entry says how many cases were offered, how many there are to use, and how many cannot be used, by code.
The first is of the time when the site agreed to take part; a run has several where the cohort changed while
it went on, by a withdrawal or a new freeze.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from client import files, quarantine, usage
from client.cohort import Cohort
from client.site import Site
from common.errors import StateError, UserError
from common.value import Value

FILE = "cohort.json"


class Tally(Value):
    """The cohort as it was for the tasks of a run from ``since`` (UTC) on.

    Attributes:
        offered: rows of the listing; ``used``, which the tasks use, and ``quarantined`` together.
        parts: patients by part.
    """

    plan_hash: str
    cohort_version: str
    since: datetime
    offered: int
    used: int
    quarantined: dict[str, int]
    parts: dict[str, int]


TALLIES = TypeAdapter(tuple[Tally, ...])


def record(directory: Path, *, plan_hash: str, cohort: Cohort) -> None:
    """Adds what a run finds now, where it is something else than before.

    Args:
        directory: the run's, open: see ``client/run_folder.py``.

    Raises:
        StateError: the file is damaged; it is left as it is.
    """
    found = Tally(
        plan_hash=plan_hash,
        cohort_version=cohort.version,
        since=datetime.now(UTC),
        offered=cohort.offered,
        used=cohort.used,
        quarantined=dict(cohort.reasons),
        parts={name: len(part.patients) for name, part in cohort.parts.items()},
    )
    path = directory / FILE
    before = _read(path) if path.exists() else ()
    if not before or before[-1].model_copy(update={"since": found.since}) != found:
        files.write_private(path, content=TALLIES.dump_json((*before, found), indent=2))


def find(site: Site, *, run: str) -> tuple[Tally, ...]:
    """Returns what a run found, the oldest first.

    Raises:
        UserError: the site has no such run.
        StateError: the file is damaged.
    """
    known = {path.parent.name: path for path in site.runs.glob(f"*/{FILE}")}
    if run not in known:
        raise UserError(f"Expected one of the {len(known)} runs in {site.runs}, found none called {run}.")
    return _read(known[run])


def last(site: Site, *, run: str) -> Tally | None:
    """Returns what the tasks of a run found last; None where none has used a case here.

    Raises:
        StateError: the file is damaged.
    """
    return _read(site.runs / run / FILE)[-1] if _has_used(site, run) else None


def report(site: Site, run: str, *, as_json: bool) -> int:
    """Prints what a run found: offered, used, and quarantined by code."""
    found, has_used = find(site, run=run), _has_used(site, run)
    console = Console()
    if as_json:
        console.print_json(data=[one.model_dump(mode="json") | {"has_used": has_used} for one in found])
        return 0
    for one in found:
        console.print(_table(one))
    if not has_used:
        console.print("The site agreed to take part; no task of the run has used a case yet.")
    return 0


def _has_used(site: Site, run: str) -> bool:
    return (site.runs / run / usage.FILE).exists()


def _table(one: Tally) -> Table:
    when = f"{one.since:%Y-%m-%d %H:%M}"
    title = f"from {when} UTC, plan {one.plan_hash[:12]}, cohort {one.cohort_version[:12]}"
    table = Table(title=title, title_justify="left")
    for name in ("", "cases", "remedy"):
        table.add_column(name, justify="right" if name == "cases" else "left", overflow="fold")
    table.add_row("offered", str(one.offered), "")
    table.add_row("used", str(one.used), ", ".join(f"{name}: {n} patients" for name, n in one.parts.items()))
    for code, count in one.quarantined.items():
        table.add_row(code, str(count), quarantine.REMEDIES.get(code, ""))
    return table


def _read(path: Path) -> tuple[Tally, ...]:
    try:
        return TALLIES.validate_json(path.read_bytes())
    except (ValidationError, OSError):
        raise StateError(
            f"Expected what a run found in {path}, found damage; restore it from a backup, or move it away."
        ) from None
