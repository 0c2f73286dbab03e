"""The hospital's own case table: which of its columns is what, and the cases that it lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from client import spreadsheet
from client.case import Case, PatientIs, Refused, inside
from client.join import Archive, PacsJoin
from client.spreadsheet import Row
from common.asked import Class, Target
from common.errors import DataError, UnusableCase
from common.value import Name, Value

if TYPE_CHECKING:  # its module needs the site's settings, which need this one
    from client.pacs import Series

Column = Annotated[str, Field(min_length=1, max_length=200)]
NO_PATIENTS = (
    "add it, since privacy is counted by patient, or say patient_is: case in site.yaml if every image is its "
    "own patient"
)
YES, NO = ("1", "true", "yes"), ("0", "false", "no")


def texts(mapping: Any) -> Any:
    """YAML reads 1 as a number, and yes as a truth value, of which nobody knows how it was written."""
    if not isinstance(mapping, Mapping):
        return mapping
    if any(isinstance(key, bool) for key in mapping):
        raise ValueError("expected texts to map, found yes, no, true or false; write them in quotes")
    return {str(key): value for key, value in mapping.items()}


class Table(Value):
    """A table file with a row for each case; every key is explained in ``site.yaml``."""

    kind: Literal["table"]
    file: Column
    sheet: Column | None
    patient: Column
    images: Annotated[dict[Name, Column], Field(min_length=1)]
    image_path: Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]
    pacs: PacsJoin | None
    label: Column | None
    separator: Annotated[str, Field(min_length=1, max_length=4)] | None
    classes: Annotated[dict[str, Class | None], BeforeValidator(texts)]
    label_columns: Annotated[dict[Column, Class], BeforeValidator(texts)]
    mask: Column | None
    values: dict[Name, Column]

    @model_validator(mode="after")
    def _says_what_a_case_is_labelled_with(self) -> Self:
        if self.label is not None and self.label_columns:
            raise ValueError("expected label or label_columns, found both")
        if self.label is None and (self.separator or self.classes):
            raise ValueError("separator and classes have no effect without label")
        if not self.targets:
            raise ValueError("expected label, label_columns or mask, found none")
        if None in self.classes.values() and self.separator is None:
            raise ValueError("a value of no class needs a separator, since a case has one class without it")
        return self

    @model_validator(mode="after")
    def _pacs_knows_every_image(self) -> Self:
        if self.pacs is None:
            return self
        if self.image_path != "{}":
            raise ValueError("image_path has no effect with pacs; set it to '{}'")
        if set(self.pacs.series) != set(self.images):
            raise ValueError(f"expected in pacs.series every image of {list(self.images)}")
        if self.pacs.case == "instance" and len(self.images) > 1:
            raise ValueError("expected one image where every instance is a case, found several")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the images of a case."""
        return tuple(self.images)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What a plan may be about."""
        several = bool(self.separator or self.label_columns)
        labels: tuple[Target, ...] = ("labels",) if several else ("class",) if self.label else ()
        return (*labels, "mask") if self.mask is not None else labels

    def columns(self, *, patient_is: PatientIs) -> list[str]:
        """Returns the columns that are read; no other is."""
        own = [self.patient] if patient_is == "column" else []
        one = [name for name in (self.label, self.mask) if name is not None]
        wanted = [*self.images.values(), *one, *self.label_columns, *own, *self.values.values()]
        return list(dict.fromkeys(wanted))


def rows(
    settings: Table, *, directory: Path, patient_is: PatientIs, fetched: Sequence[Series] = ()
) -> Iterator[Case | Refused]:
    """Yields one value per row of a case table; more where each instance of a series is a case.

    With ``patient_is="case"`` every case is its own patient. A row that repeats a case is refused as
    ``duplicate_row``, or as ``contradictory_rows`` if it says something else than the first one, which
    was yielded already and must not be used either.

    Args:
        fetched: what is there of the PACS, if the table names it.

    Raises:
        DataError: as ``spreadsheet.rows``; or a patient column that contradicts ``patient_is="case"``.
    """
    seen: dict[str, Case] = {}
    patients: set[str] = set()
    join = settings.pacs
    archive = None if join is None else Archive(fetched, by=join.by, directory=directory)
    found = spreadsheet.rows(
        directory / settings.file,
        columns=settings.columns(patient_is=patient_is),
        optional=[settings.patient] if patient_is == "case" else [],
        sheet=settings.sheet,
        remedies={settings.patient: NO_PATIENTS},
    )
    for row in found:
        if patient_is == "case":
            _check_distinct(row, patient=settings.patient, seen=patients)
        for case in _cases(row, settings, archive, patient_is=patient_is):
            yield _first_of(case, seen=seen)


def _cases(
    row: Row, settings: Table, archive: Archive | None, *, patient_is: PatientIs
) -> list[Case | Refused]:
    if row.cells is None:
        return [Refused(image=f"line {row.line}", code="malformed_row")]
    cells = row.cells
    named = cells[next(iter(settings.images.values()))]
    try:
        about: dict[str, Any] = {
            "labels": _labels(cells, settings),
            "mask": inside(cells[settings.mask]) if settings.mask and cells[settings.mask] else "",
            "values": tuple(cells[column] for column in settings.values.values()),
        }
        return [
            Case(images=images, patient=_patient(cells, settings, images[0], patient_is=patient_is), **about)
            for images in _images(cells, settings, archive)
        ]
    except UnusableCase as error:
        return [Refused(image=named, code=error.code)]


def _images(cells: Mapping[str, str], settings: Table, archive: Archive | None) -> list[tuple[str, ...]]:
    keys = {name: cells[column] for name, column in settings.images.items()}
    if "" in keys.values():
        raise UnusableCase("missing_image")
    if archive is None or settings.pacs is None:
        return [tuple(inside(settings.image_path.replace("{}", key)) for key in keys.values())]
    return archive.images(keys, settings.pacs)


def _patient(cells: Mapping[str, str], settings: Table, image: str, *, patient_is: PatientIs) -> str:
    patient = cells[settings.patient] if patient_is == "column" else image
    if not patient:
        raise UnusableCase("missing_patient")
    return patient


def _labels(cells: Mapping[str, str], settings: Table) -> tuple[str, ...] | None:
    if settings.label_columns:
        said = {name for column, name in settings.label_columns.items() if _is_yes(cells[column])}
        return tuple(sorted(said))
    cell = "" if settings.label is None else cells[settings.label]
    if not cell:
        return None
    found = [cell] if settings.separator is None else [one.strip() for one in cell.split(settings.separator)]
    named = [_class(one, settings) for one in found if one]
    return tuple(sorted({one for one in named if one is not None}))


def _class(value: str, settings: Table) -> str | None:
    if not settings.classes:
        return value
    if value not in settings.classes:
        raise UnusableCase("unknown_label")
    return settings.classes[value]


def _is_yes(cell: str) -> bool:
    word = cell.lower()
    if word not in (*YES, *NO):
        raise UnusableCase("unclear_label")
    return word in YES


def _first_of(row: Case | Refused, *, seen: dict[str, Case]) -> Case | Refused:
    if isinstance(row, Refused):
        return row
    first = seen.setdefault(row.image, row)
    if first is row:
        return row
    return Refused(image=row.image, code="duplicate_row" if first == row else "contradictory_rows")


def _check_distinct(row: Row, *, patient: str, seen: set[str]) -> None:
    """Refuses a table whose own patient column shows that a case is not its own patient."""
    named = (row.cells or {}).get(patient, "")
    if named and named in seen:
        raise DataError(
            f"Expected every case to be its own patient (patient_is: case), found in line {row.line} a "
            f"{patient} that occurred before; say patient_is: column in site.yaml."
        )
    seen.add(named)
