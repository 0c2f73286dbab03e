"""What stands out among the cases of a site, and which cases the hospital's rules refuse for it.

Most of it compares cases with each other. That is done here, when the cohort is checked or frozen, and
never while a run is on, when a case is judged by itself alone.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from client import files, quarantine, split
from client.case import Case
from client.rules import Decision, Rules
from client.sight import Sight
from client.site import Site

PIXEL_CODES = ("duplicate_pixels", "contradictory_pixels", "shared_pixels")
LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
ONE_PATIENT_FRACTION = 0.5  # of the cases: more of one patient than this is hardly one patient
NO_PATIENTS_FRACTION = 0.9  # of the cases: this is no patient column
LEAST_CASES = 10  # below which a patient may well have most of them

Level = Literal["ok", "warning", "error"]
SAYS: Mapping[str, str] = {
    "duplicate_pixels": "the same picture more than once for one patient",
    "contradictory_pixels": "the same picture of one patient under different labels or values",
    "shared_pixels": "the same picture under different patients",
    "similar_patients": "patients whose names differ only in case, spaces, leading zeros or punctuation",
    "wrong_modality": "a modality that site.yaml does not expect",
    "mixed_modalities": "another modality than most",
    "wrong_photometric": "colour or grey that site.yaml does not expect",
    "mixed_photometric": "colour among grey, or grey among colour",
    "implausible_size": "fewer or more pixels along an axis than site.yaml expects",
    "implausible_spacing": "pixels, or a whole image, smaller or larger in mm than site.yaml expects",
    "burned_in_text": "the header says that text is burned into the picture",
    "suspected_text": "the picture seems to show burned-in text (a guess by shape)",
    "one_patient": "one patient has most of the cases",
    "undecoded": "the cohort was frozen by a run, which compares files and not pixels",
    "not_applied": "the frozen cohort holds cases that the rules would refuse",
    "rare_to_learn": "a class of which the training part has too few patients",
    "drowned": "a class whose patients the plan's noise drowns",
    "rare_to_test": "a class of which the test part has fewer patients than its released counts have noise",
    "much_enlarged": "images of less than half the plan's size along an axis",
}
REMEDIES: Mapping[str, str] = {
    "one_patient": "name the column of the patient in site.yaml; an accession or a place is no patient",
    "undecoded": "feverfew-client check --freeze",
    "not_applied": "feverfew-client check --freeze",
    "rare_to_learn": "add cases, join classes, or leave the class out of the plan",
    "drowned": "add cases, join classes, or agree on a larger epsilon or more rounds",
    "rare_to_test": "read this class's figures only over all hospitals together",
    "much_enlarged": "what is enlarged has no more detail; export at full resolution",
}
LEVELS: Mapping[Decision, Level] = {"refuse": "warning", "keep": "warning", "ask": "error"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that stands out.

    Attributes:
        cases: how many it concerns.
        example: image, patient or class; for the eyes of the site only.
        decision: what becomes of the images; ``None`` where nothing is to be decided.
        images: the cases that it names: those refused, if that is the decision.
        sets: where copies are concerned, the set by image, the one copy that stays included.
        note: more about it, without a name.
    """

    code: str
    level: Level
    cases: int
    example: str
    decision: Decision | None = None
    images: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def says(self) -> str:
        """What it is, in a few words."""
        return SAYS[self.code]

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES.get(self.code) or quarantine.REMEDIES[self.code]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A case and what was seen of it."""

    case: Case
    sight: Sight


def find(
    site: Site,
    *,
    cases: Iterable[Case],
    seen: Mapping[str, Sight | str],
    decided: Mapping[str, Decision] | None = None,
    secret: bytes,
) -> tuple[Finding, ...]:
    """Returns all that stands out, by the rules of ``site.yaml`` and what a person decided otherwise.

    Args:
        seen: by image; cases whose files cannot be read have a code, and are passed over.
        decided: by code, for this time only.
        secret: of the split, to tell what lies in two parts.
    """
    looked = [Looked(case=case, sight=one) for case in cases if isinstance(one := seen[case.image], Sight)]
    rules, own_patients = site.settings.rules, site.settings.patient_is == "case"
    named: dict[str, list[str]] = {
        **_same_pixels(looked, own_patients=own_patients),
        # Where every case is a patient of its own, the names of patients are paths.
        "similar_patients": [] if own_patients else _similar_patients(looked),
        **_by_itself(looked, rules),
        "mixed_modalities": _mixed(looked, lambda one: one.sight.declared.modality),
        "mixed_photometric": _mixed(looked, _colour),
    }
    if rules.modalities:
        del named["mixed_modalities"]
    decisions: dict[str, Decision] = {**rules.decisions.model_dump(), **(decided or {})}
    found = [_finding(code, images, decisions[code]) for code, images in named.items() if images]
    found = [_with_sets(one, looked) if one.code in PIXEL_CODES else one for one in found]
    return tuple(_with_parts(one, looked, site, secret) for one in found) + tuple(_one_patient(looked))


def write(path: Path, found: Iterable[Finding]) -> None:
    """Writes ``findings.csv``: every case that is named, with its set of copies, and what became of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("code", "set", "image", "decided"))
    for one in found:
        rows = sorted((one.sets.get(image, ""), image) for image in {*one.images, *one.sets})
        decided = {image: one.decision or "" for image in one.images}
        writer.writerows((one.code, group, image, decided.get(image, "keep")) for group, image in rows)
    files.write_private(path, content=text.getvalue().encode())


def refused(found: Iterable[Finding]) -> dict[str, str]:
    """Returns the code by image of every case that is not to be used; the first code of several."""
    codes: dict[str, str] = {}
    for one in found:
        if one.decision == "refuse":
            for image in one.images:
                codes.setdefault(image, one.code)
    return codes


def open_questions(found: Iterable[Finding]) -> list[str]:
    """Returns the codes that a person has to decide before a cohort can be frozen."""
    return [one.code for one in found if one.decision == "ask"]


def _finding(code: str, images: Sequence[str], decision: Decision) -> Finding:
    return Finding(
        code=code,
        level=LEVELS[decision],
        cases=len(images),
        example=min(images),
        decision=decision,
        images=tuple(sorted(images)),
    )


def _same_pixels(looked: Sequence[Looked], *, own_patients: bool) -> dict[str, list[str]]:
    """Names copies: of one patient all but the first; all of them where labels or patients contradict.

    Where every case is a patient of its own, copies are taken to be of one patient.
    """
    groups: defaultdict[str, list[Looked]] = defaultdict(list)
    for one in looked:
        if not one.sight.code:  # broken files are often alike, and no pictures
            groups[one.sight.pixels].append(one)
    named: dict[str, list[str]] = {"shared_pixels": [], "contradictory_pixels": [], "duplicate_pixels": []}
    for group in groups.values():
        if len(group) == 1:
            continue
        images = sorted(one.case.image for one in group)
        if not own_patients and len({one.case.patient for one in group}) > 1:
            named["shared_pixels"] += images
        elif len({_said(one) for one in group}) > 1:
            named["contradictory_pixels"] += images
        else:
            named["duplicate_pixels"] += images[1:]
    return named


def _said(one: Looked) -> tuple[object, ...]:
    return one.case.labels, one.case.values, one.sight.mask


def _with_sets(found: Finding, looked: Sequence[Looked]) -> Finding:
    named = set(found.images)
    pixels = {one.sight.pixels for one in looked if one.case.image in named}
    same = {one.case.image: one.sight.pixels[:12] for one in looked if one.sight.pixels in pixels}
    return replace(found, sets=same)


def _similar_patients(looked: Iterable[Looked]) -> list[str]:
    """Names the cases of patients who are written in more than one way."""
    written: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in looked:
        written[_plain(one.case.patient)][one.case.patient].append(one.case.image)
    several = (ways for plain, ways in written.items() if plain and len(ways) > 1)
    return [image for ways in several for images in ways.values() for image in images]


def _plain(patient: str) -> str:
    """Returns a patient's name without what is written now one way, now the other.

    >>> _plain("PAT-0012") == _plain("pat 12"), _plain("0012") == _plain("12"), _plain("P100") == _plain("P1")
    (True, True, False)
    """
    kept = "".join(letter for letter in patient.casefold() if letter.isalnum())
    return LEADING_ZEROS.sub("", kept)


def _by_itself(looked: Sequence[Looked], rules: Rules) -> dict[str, list[str]]:
    """Names cases by what each is in itself."""
    tests: dict[str, Callable[[Looked], bool]] = {
        "wrong_modality": lambda one: bool(
            rules.modalities and one.sight.declared.modality not in ("", *rules.modalities)
        ),
        "wrong_photometric": lambda one: (
            rules.photometric != "any" and _colour(one) not in ("", rules.photometric)
        ),
        "implausible_size": lambda one: not all(map(rules.pixels.holds, _lengths(one.sight))),
        "implausible_spacing": lambda one: _is_implausible(one.sight, rules),
        "burned_in_text": lambda one: one.sight.declared.burned_in,
        "suspected_text": lambda one: one.sight.lettered and not one.sight.declared.burned_in,
    }
    return {code: [one.case.image for one in looked if test(one)] for code, test in tests.items()}


def _lengths(sight: Sight) -> list[int]:
    return [length for shape in sight.shapes for length in shape[1:]]


def _is_implausible(sight: Sight, rules: Rules) -> bool:
    for shape, spacing in zip(sight.shapes, sight.spacing_mm, strict=True):
        for length, step in zip(shape[1:], spacing, strict=False):  # no spacing is not judged
            if not rules.spacing_mm.holds(step) or not rules.extent_mm.holds(length * step):
                return True
    return False


def _colour(one: Looked) -> str:
    channels = {shape[0] for shape in one.sight.shapes}
    return "" if not channels else "colour" if 3 in channels else "grey"


def _mixed(looked: Sequence[Looked], kind: Callable[[Looked], str]) -> list[str]:
    """Names the cases that are of another kind than most; those of no kind are passed over."""
    counted = Counter(found for one in looked if (found := kind(one)))
    if len(counted) < 2:
        return []
    usual = max(sorted(counted), key=lambda name: counted[name])
    return [one.case.image for one in looked if kind(one) not in ("", usual)]


def _with_parts(found: Finding, looked: Sequence[Looked], site: Site, secret: bytes) -> Finding:
    """Says of the same pixels, or the same patient, under two patients how many lie in two parts."""
    if found.code not in ("shared_pixels", "similar_patients"):
        return found
    named = set(found.images)
    parts: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for one in looked:
        if one.case.image in named:
            same = one.sight.pixels if found.code == "shared_pixels" else _plain(one.case.patient)
            part = split.part_of(split.pseudonym(one.case.patient, secret=secret), split=site.settings.split)
            parts[same][part] = parts[same].get(part, 0) + 1
    torn = sum(sum(counts.values()) for counts in parts.values() if len(counts) > 1)
    note = f"{torn} of them lie in two parts: trained on in one, tested on in the other" if torn else ""
    return replace(found, note=note)


def _one_patient(looked: Sequence[Looked]) -> list[Finding]:
    counted = Counter(one.case.patient for one in looked)
    if len(looked) < LEAST_CASES:
        return []
    [(patient, cases)] = counted.most_common(1)
    if cases <= ONE_PATIENT_FRACTION * len(looked):
        return []
    level: Level = "error" if cases >= NO_PATIENTS_FRACTION * len(looked) else "warning"
    return [Finding(code="one_patient", level=level, cases=cases, example=patient)]
