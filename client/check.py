"""What a hospital is told before it takes part: which cases would be used, which not, what is missing.

Nothing of this leaves the site.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from client import frozen, quarantine
from client.cohort import Cohort, Part, open_cohort
from client.frozen import Progress as OnProgress
from client.site import Site
from common.plan import Preprocessing

NOMINAL_TOLERANCE = 0.2  # a batch then has at most a fifth more or fewer patients than the plan expects
NOMINAL_LEEWAY = 5  # patients; the split is random, and small sites differ by that much by chance

Level = Literal["ok", "warning", "error"]
STYLES: Mapping[Level, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was looked at; ``error`` means that the site cannot take part like this."""

    name: str
    text: str
    level: Level = "ok"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Number of patients and of cases; a patient counts in every class of which they have a case."""

    patients: int
    cases: int


@dataclass(frozen=True, kw_only=True)
class PartFindings:
    """What is in one part, and by class."""

    total: Counts
    by_class: Mapping[str, Counts]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What ``check`` found at a site; for the site only."""

    site: str
    version: str
    offered: int
    used: int
    patients: int
    parts: Mapping[str, PartFindings]
    quarantined: Mapping[str, int]
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether the site can take part."""
        return all(line.level != "error" for line in self.lines)

    def to_tree(self) -> dict[str, Any]:
        """Returns plain values for JSON, with the remedy beside each code."""
        tree = asdict(self)
        tree["quarantined"] = {
            code: {"cases": count, "remedy": quarantine.REMEDIES[code]}
            for code, count in self.quarantined.items()
        }
        return {"ok": self.ok, **tree}


def check(
    site: Site,
    *,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    others: Sequence[Line] = (),
    on_progress: OnProgress | None = None,
) -> Findings:
    """Looks at a site's data as a plan would use them; reads and preprocesses every case once.

    Args:
        others: what was found beside the data, to be shown with the rest: see ``client.inspection``.
        on_progress: told (done, total); see ``progress``.

    Raises:
        UserError, StateError: as ``cohort.open_cohort``.
    """
    cohort = open_cohort(site, preprocessing=preprocessing, classes=classes, on_progress=on_progress)
    parts = {name: _count(part, classes=classes) for name, part in cohort.parts.items()}
    lines = (
        *_table_lines(site),
        _cases_line(cohort),
        *_training_lines(site, parts["train"]),
        Line(name="split key", text="present, readable by this account only"),
        _machine_line(site),
        *others,
    )
    return Findings(
        site=site.name,
        version=cohort.version,
        offered=cohort.offered,
        used=cohort.used,
        patients=sum(part.total.patients for part in parts.values()),
        parts=parts,
        quarantined=cohort.reasons,
        lines=lines,
    )


def _count(part: Part, *, classes: tuple[str, ...]) -> PartFindings:
    owners = np.zeros(len(part.labels), dtype=np.int64)
    for number, cases in enumerate(part.patients):
        owners[cases] = number
    by_class = {}
    for index, name in enumerate(classes):
        of_class = part.labels == index
        by_class[name] = Counts(patients=len(np.unique(owners[of_class])), cases=int(of_class.sum()))
    return PartFindings(total=Counts(patients=len(part.patients), cases=len(owners)), by_class=by_class)


def _table_lines(site: Site) -> tuple[Line, ...]:
    lines = []
    if site.settings.patient_is == "case":
        text = "every image is its own patient, says site.yaml (patient_is: case)"
        lines.append(Line(name="patients", text=text))
    if frozen.has_changed(site):
        text = (
            "has changed since the cohort was frozen; to use it as it is now: feverfew-client check --freeze"
        )
        lines.append(Line(name="case table", text=text, level="warning"))
    return tuple(lines)


def _cases_line(cohort: Cohort) -> Line:
    text = f"{cohort.used} of {cohort.offered} can be used"
    if cohort.used == cohort.offered:
        return Line(name="cases", text=text)
    return Line(name="cases", text=f"{text}; private/quarantine.csv lists the others", level="warning")


def _training_lines(site: Site, found: PartFindings) -> tuple[Line, ...]:
    if site.settings.role != "training":
        return ()
    if found.total.cases == 0:
        return (Line(name="training", text="no case to train on", level="error"),)
    absent = [name for name, counts in found.by_class.items() if counts.cases == 0]
    lines = [Line(name="training", text=f"no case of {name}", level="warning") for name in absent]
    return (_nominal_line(site.settings.nominal_patients, found.total.patients), *lines)


def _nominal_line(nominal: int, patients: int) -> Line:
    text = f"{nominal} in site.yaml, {patients} in the training part"
    if abs(patients - nominal) <= max(NOMINAL_TOLERANCE * nominal, NOMINAL_LEEWAY):
        return Line(name="nominal_patients", text=text)
    more = "more noise than need be" if patients > nominal else "batches smaller than the plan expects"
    text = f"{text}: {more}; choose a round number nearer to it"
    return Line(name="nominal_patients", text=text, level="warning")


def _machine_line(site: Site) -> Line:
    threads, cpus = site.settings.threads, len(os.sched_getaffinity(0))
    text = f"cpu, {threads} of {cpus} threads"
    return Line(name="device", text=text, level="ok" if threads <= cpus else "warning")


def render(findings: Findings) -> RenderableType:
    """Returns the findings as tables for a terminal."""
    blocks = [_parts_table(findings), _lines_table(findings)]
    if findings.quarantined:
        blocks.insert(1, _quarantine_table(findings))
    return Group(*blocks)


def _parts_table(findings: Findings) -> Table:
    classes = tuple(next(iter(findings.parts.values())).by_class)
    table = Table(title=f"{findings.site}: patients (cases)", title_justify="left")
    table.add_column("part")
    for name in (*classes, "all"):
        table.add_column(escape(name), justify="right")
    for name, part in findings.parts.items():
        cells = [part.by_class[one] for one in classes]
        table.add_row(name, *(f"{cell.patients} ({cell.cases})" for cell in (*cells, part.total)))
    return table


def _quarantine_table(findings: Findings) -> Table:
    table = Table(title="not used", title_justify="left")
    for name in ("code", "cases", "remedy"):
        table.add_column(name, justify="right" if name == "cases" else "left")
    for code, count in findings.quarantined.items():
        table.add_row(code, str(count), quarantine.REMEDIES[code])
    return table


def _lines_table(findings: Findings) -> Table:
    table = Table.grid(padding=(0, 2))
    for line in findings.lines:
        table.add_row(f"[{STYLES[line.level]}]{line.level}[/]", escape(line.name), escape(line.text))
    return table


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """Shows a progress bar as long as the block lasts; yields what to hand on as ``on_progress``."""
    columns = (TextColumn("reading cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("cases", total=None)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield told


def report(
    site: Site,
    *,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    others: Sequence[Line] = (),
    freeze: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Checks a site and prints what was found; returns the exit code, 0 if the site can take part.

    Args:
        freeze: take the case table and the files as they are now, as the next version of the cohort.
        as_json: print JSON instead of tables.
        console: where to print; standard output unless given. The progress bar goes to standard error.
    """
    with progress(Console(stderr=True)) as on_progress:
        if freeze:
            frozen.freeze(site, on_progress=on_progress)
        findings = check(
            site,
            preprocessing=preprocessing,
            classes=classes,
            others=others,
            on_progress=on_progress,
        )
    console = console or Console()
    if as_json:
        console.print_json(data=findings.to_tree())
    else:
        console.print(render(findings))
    return 0 if findings.ok else 1
