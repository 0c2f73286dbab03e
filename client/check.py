"""What a hospital is told before it takes part: which cases would be used, which not, what is missing.

Nothing of this leaves the site.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from client import findings, frozen, preprocessing, quarantine, rarity, room, split, survey, withdrawal
from client.cohort import Cohort, Part, open_cohort
from client.findings import Finding, Level
from client.frozen import Frozen
from client.frozen import Progress as OnProgress
from client.rules import Decision
from client.sight import Sight
from client.site import Site
from common.asked import Asked
from common.plan import Plan

NOMINAL_TOLERANCE = 0.2  # a batch then has at most a fifth more or fewer patients than the plan expects
NOMINAL_LEEWAY = 5  # patients; the split is random, and small sites differ by that much by chance
MUCH_ENLARGED = 2


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
    """What ``check`` found at a site; for the site only.

    Attributes:
        version: of the cohort; "" where none could be frozen, and then there are no parts.
        found: what stands out; their examples name cases and patients.
    """

    site: str
    version: str
    offered: int
    used: int
    patients: int
    parts: Mapping[str, PartFindings]
    quarantined: Mapping[str, int]
    found: tuple[Finding, ...]
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether the site can take part."""
        levels = [*(line.level for line in self.lines), *(one.level for one in self.found)]
        return "error" not in levels

    def to_tree(self) -> dict[str, Any]:
        """Returns plain values for JSON, with the remedy beside each code; no case or patient is named."""
        return {
            "ok": self.ok,
            "site": self.site,
            "version": self.version,
            "offered": self.offered,
            "used": self.used,
            "patients": self.patients,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "quarantined": {
                code: {"cases": count, "remedy": quarantine.REMEDIES[code]}
                for code, count in self.quarantined.items()
            },
            "findings": [_finding_tree(one) for one in self.found],
            "lines": [asdict(line) for line in self.lines],
        }


def _finding_tree(one: Finding) -> dict[str, Any]:
    names = ("code", "level", "cases", "says", "decision", "note", "remedy")
    return {name: getattr(one, name) for name in names}


def check(
    site: Site,
    *,
    asked: Asked,
    plan: Plan | None = None,
    others: Sequence[Line] = (),
    freeze: bool = False,
    decided: Mapping[str, Decision] | None = None,
    on_progress: OnProgress | None = None,
) -> Findings:
    """Looks at a site's data as a plan would use them; decodes, compares and preprocesses every case.

    Args:
        plan: that which asks, if there is one: its noise decides which classes are too rare.
        others: what was found beside the data, to be shown with the rest: see ``client.inspection``.
        freeze: take the listing and the files as they are now, as the next version of the cohort. The first
            check does so in any case.
        decided: what a person decided for this freezing, by code.
        on_progress: told (done, total), twice over all cases; see ``report.progress``.

    Raises:
        UserError, StateError: as ``cohort.open_cohort``.
    """
    secret = split.read_key(site)
    listed = None if freeze else frozen.read(site, secret=secret)
    cases, refused = frozen.accepted(frozen.listed_rows(site))
    seen = survey.survey(site, cases=cases, on_progress=on_progress)
    chosen = decided or _decided_before(site, listed)
    found = findings.find(site, cases=cases, seen=seen, decided=chosen, secret=secret)
    found = (*found, *_enlarged(seen, asked))
    if listed is None:
        questions = findings.open_questions(found)
        if questions:
            codes = Counter([one.code for one in refused])
            return _undecided(site, found, offered=len(cases) + len(refused), codes=codes, others=others)
        frozen.freeze(site, seen=seen, decided=decided)
    else:
        found = (*found, *_not_applied(site, listed, found))
    del seen  # it is large, and what follows needs room
    return _found_of(
        site, open_cohort(site, asked=asked, on_progress=on_progress), found, asked, plan, others
    )


def _decided_before(site: Site, listed: Frozen | None) -> dict[str, Decision]:
    """Returns what a person decided where the rules ask."""
    rules: dict[str, Decision] = site.settings.rules.decisions.model_dump()
    decided = {} if listed is None else listed.decided
    return {code: decided[code] for code, rule in rules.items() if rule == "ask" and code in decided}


def _undecided(
    site: Site, found: Sequence[Finding], *, offered: int, codes: Mapping[str, int], others: Sequence[Line]
) -> Findings:
    questions = " or ".join(findings.open_questions(found))
    text = f"not frozen: decide about {questions} with --refuse CODE or --keep CODE, or in site.yaml"
    return Findings(
        site=site.name,
        version="",
        offered=offered,
        used=0,
        patients=0,
        parts={},
        quarantined=dict(sorted(codes.items())),
        found=tuple(found),
        lines=(Line(name="cohort", text=text, level="error"), *others),
    )


def _found_of(
    site: Site,
    cohort: Cohort,
    found: Sequence[Finding],
    asked: Asked,
    plan: Plan | None,
    others: Sequence[Line],
) -> Findings:
    parts = {name: _count(part, asked) for name, part in cohort.parts.items()}
    patients = {name: {one: c.patients for one, c in part.by_class.items()} for name, part in parts.items()}
    lines = (
        *_table_lines(site),
        _cases_line(site, cohort),
        *_training_lines(site, parts["train"]),
        *_room_lines(site, cohort, asked),
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
        found=(*found, *rarity.rare(site.settings, patients=patients, plan=plan)),
        lines=lines,
    )


def _enlarged(seen: Mapping[str, Sight | str], asked: Asked) -> list[Finding]:
    size = asked.preprocessing.size

    def is_small(one: Sight | str) -> bool:
        shapes = () if isinstance(one, str) else one.shapes
        pairs = [pair for shape in shapes for pair in zip(shape[1:], size, strict=False)]
        return any(MUCH_ENLARGED * length < wanted for length, wanted in pairs)

    images = sorted(image for image, one in seen.items() if is_small(one))
    if not images:
        return []
    return [Finding(code="much_enlarged", level="warning", cases=len(images), example=images[0])]


def _not_applied(site: Site, listed: Frozen, found: Sequence[Finding]) -> list[Finding]:
    """Finds the cases of the frozen cohort that the rules would refuse if it were frozen now."""
    withdrawn = withdrawal.withdrawn(site)
    codes = findings.refused(found)
    images = sorted(
        one.case.image
        for one in listed.cases
        if one.case.image in codes and one.case.patient not in withdrawn
    )
    if not images:
        return []
    by_files = (
        "frozen without a check, which compares files and not pixels" if listed.compared == "files" else ""
    )
    return [Finding(code="not_applied", level="warning", cases=len(images), example=images[0], note=by_files)]


def _count(part: Part, asked: Asked) -> PartFindings:
    owners = np.zeros(len(part.images), dtype=np.int64)
    for number, cases in enumerate(part.patients):
        owners[cases] = number
    by_class = {}
    for index, name in enumerate(asked.classes):
        of_class = part.has_class(index)
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


def _cases_line(site: Site, cohort: Cohort) -> Line:
    text = f"{cohort.used} of {cohort.offered} can be used"
    if cohort.used == cohort.offered:
        return Line(name="cases", text=text)
    text = f"{text}; private/quarantine.csv lists the others"
    most = site.settings.rules.max_quarantined_fraction
    if quarantine.fraction(cohort.reasons, offered=cohort.offered) <= most:
        return Line(name="cases", text=text, level="warning")
    text = f"{text}; more than {most:.0%} are unusable (max_quarantined_fraction): runs are declined"
    return Line(name="cases", text=text, level="error")


def _room_lines(site: Site, cohort: Cohort, asked: Asked) -> tuple[Line, ...]:
    """Says what a run may tell nobody: that the true cases need more room than the limit."""
    needed = cohort.used * preprocessing.record_type(asked).itemsize / room.GIGABYTE
    most = site.settings.max_cache_gigabytes
    if needed <= most:
        return ()
    text = f"the preprocessed cases take {needed:.2g} GB, max_cache_gigabytes is {most:g}; raise it"
    return (Line(name="cache", text=text, level="error"),)


def _training_lines(site: Site, found: PartFindings) -> tuple[Line, ...]:
    if site.settings.role != "training":
        return ()
    if found.total.cases == 0:
        return (Line(name="training", text="no case to train on", level="error"),)
    return (_nominal_line(site.settings.nominal_patients, found.total.patients),)


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
