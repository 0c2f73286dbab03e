"""The hospital's case table ``cases.csv``: image, label, patient_id; more columns are allowed."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from common.errors import DataError

PatientIs = Literal["column", "case"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One labelled image: its path relative to the site directory, its class, its patient."""

    image: str
    label: str
    patient: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that is not used, with the code of the reason."""

    image: str
    code: str


def rows(path: Path, *, patient_is: PatientIs) -> Iterator[Case | Refused]:
    """Yields one value per row of a case table, UTF-8 with or without byte order mark.

    With ``patient_is="case"`` every image is its own patient. A row that repeats an image is refused as
    ``duplicate_row``, or as ``contradictory_rows`` if it says something else than the first one, which
    was yielded already and must not be used either.

    Raises:
        DataError: no such file, not CSV in UTF-8, a column missing, or a patient_id column that
            contradicts ``patient_is="case"``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _rows(stream, path=path, patient_is=patient_is)
    except FileNotFoundError:
        raise DataError(f"Expected a case table at {path}, found none; see the README for one.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"Expected UTF-8 in {path}, found byte {error.object[error.start]:#x}; save it as CSV UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"Expected a readable case table at {path}, found: {error.strerror}.") from None


def _rows(stream: TextIO, *, path: Path, patient_is: PatientIs) -> Iterator[Case | Refused]:
    reader = csv.DictReader(stream, strict=True)
    try:
        _check_header(list(reader.fieldnames or []), path=path, patient_is=patient_is)
        seen: dict[str, Case] = {}
        patients: set[str] = set()
        for row in reader:
            case = _case(row, patient_is=patient_is)
            if isinstance(case, Case):
                case = _first_of(case, seen=seen)
            if patient_is == "case":
                _check_distinct(row, seen=patients, line=reader.line_num)
            yield case
    except csv.Error as error:
        raise DataError(f"Expected CSV in line {reader.reader.line_num} of {path}, found: {error}.") from None


def _check_header(names: list[str], *, path: Path, patient_is: PatientIs) -> None:
    wanted = ("image", "label", "patient_id") if patient_is == "column" else ("image", "label")
    twice = {name for name in names if names.count(name) > 1}
    missing = [name for name in wanted if name not in names]
    if twice:
        raise DataError(f"Expected distinct column names in {path}, found {sorted(twice)} more than once.")
    if not missing:
        return
    remedy = "the first line names the columns, separated by commas"
    if missing == ["patient_id"]:
        remedy = (
            "add it, since privacy is counted by patient, or say patient_is: case in site.yaml "
            "if every image is its own patient"
        )
    found = ",".join(names)[:200] or "an empty file"
    raise DataError(f"Expected the column {missing[0]} in {path}, found {found}; {remedy}.")


def _case(row: dict[str, str | None], *, patient_is: PatientIs) -> Case | Refused:
    # csv files surplus fields under the key None, and missing ones as the value None.
    if None in row or None in row.values():
        return Refused(image=(row["image"] or "").strip(), code="malformed_row")
    image, label = (row["image"] or "").strip(), (row["label"] or "").strip()
    patient = (row["patient_id"] or "").strip() if patient_is == "column" else image
    if not image:
        return Refused(image=image, code="missing_image")
    if not _is_inside(image):
        return Refused(image=image, code="bad_path")
    if not label:
        return Refused(image=image, code="missing_label")
    if not patient:
        return Refused(image=image, code="missing_patient")
    image = posixpath.normpath(image)
    return Case(image=image, label=label, patient=patient if patient_is == "column" else image)


def _is_inside(image: str) -> bool:
    return image.isprintable() and not image.startswith("/") and ".." not in image.split("/")


def _first_of(case: Case, *, seen: dict[str, Case]) -> Case | Refused:
    first = seen.setdefault(case.image, case)
    if first is case:
        return case
    return Refused(image=case.image, code="duplicate_row" if first == case else "contradictory_rows")


def _check_distinct(row: dict[str, str | None], *, seen: set[str], line: int) -> None:
    """Refuses a table whose own patient column shows that an image is not its own patient."""
    patient = (row.get("patient_id") or "").strip()
    if patient and patient in seen:
        raise DataError(
            f"Expected every image to be its own patient (patient_is: case), found in line {line} a "
            "patient_id that occurred before; say patient_is: column in site.yaml."
        )
    seen.add(patient)
