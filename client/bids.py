"""NIfTI files in folders as BIDS has them: ``sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz``.

Source: Gorgolewski et al. (2016), The brain imaging data structure.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from client import files, spreadsheet
from client.case import Case, PatientIs, Refused, inside
from client.table import Column, texts
from common.asked import Class, Target
from common.errors import ConfigError, DataError, UnusableCase
from common.value import Name, Value

ENDINGS = (".nii.gz", ".nii")
PARTICIPANTS = "participants.tsv"

Session = tuple[str, str]
"""Folders of participant and session; "" where there are no sessions."""


class Bids(Value):
    """A BIDS folder; every session of a participant is a case, and the participant is the patient.

    ``images`` gives the suffix of each image of a case, such as ``{t1: T1w}``; ``mask`` that of the mask in
    ``mask_directory`` (such as ``derivatives/labels``). ``label`` and ``values`` are columns of
    ``participants.tsv``; ``classes`` says which value means which class, {} if they name it.
    """

    kind: Literal["bids"]
    directory: Annotated[str, Field(min_length=1)]
    images: Annotated[dict[Name, Column], Field(min_length=1)]
    label: Column | None
    classes: Annotated[dict[str, Class], BeforeValidator(texts)]
    mask: Column | None
    mask_directory: Column | None
    values: dict[Name, Column]

    @model_validator(mode="after")
    def _says_what_a_case_is_labelled_with(self) -> Self:
        if not self.targets:
            raise ValueError("expected label or mask, found neither")
        if (self.mask is None) != (self.mask_directory is None):
            raise ValueError("expected mask and mask_directory together")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the images of a case."""
        return tuple(self.images)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What a plan may be about."""
        labels: tuple[Target, ...] = ("class",) if self.label else ()
        return (*labels, "mask") if self.mask else labels


def rows(settings: Bids, *, directory: Path, patient_is: PatientIs) -> Iterator[Case | Refused]:
    """Yields the cases of all sessions, in the order of their folders.

    Raises:
        ConfigError: ``patient_is: case``, since a participant may have several sessions.
        DataError: no such folder, or ``participants.tsv`` lacks a column.
    """
    if patient_is == "case":
        raise ConfigError("Expected patient_is: column with kind bids: the participant is the patient.")
    root = directory / settings.directory
    if not root.is_dir():
        raise DataError(f"Expected a BIDS folder at {root}, found none.")
    participants = _participants(root, settings)
    images = {name: _files(root, suffix=suffix) for name, suffix in settings.images.items()}
    masks = _files(root / settings.mask_directory, suffix=settings.mask) if settings.mask_directory else {}
    for session in sorted(set().union(*images.values())):
        found = [of_kind.get(session, []) for of_kind in images.values()]
        about = participants.get(session[0], {})
        yield _case(session, found, masks.get(session, []), settings, directory=directory, about=about)


def _files(root: Path, *, suffix: str | None) -> dict[Session, list[Path]]:
    """Returns the files with a suffix, by session."""
    found: defaultdict[Session, list[Path]] = defaultdict(list)
    for path in itertools.chain.from_iterable(map(files.walk, sorted(root.glob("sub-*")))):
        if path.name.endswith(tuple(f"_{suffix}{ending}" for ending in ENDINGS)):
            parts = path.relative_to(root).parts
            found[parts[0], parts[1] if parts[1].startswith("ses-") else ""].append(path)
    return dict(found)


def _participants(root: Path, settings: Bids) -> dict[str, Mapping[str, str]]:
    columns = [*([settings.label] if settings.label else []), *settings.values.values()]
    if not columns:
        return {}
    table = spreadsheet.rows(root / PARTICIPANTS, columns=["participant_id", *columns])
    return {row.cells["participant_id"]: row.cells for row in table if row.cells is not None}


def _case(
    session: Session,
    images: list[list[Path]],
    masks: list[Path],
    settings: Bids,
    *,
    directory: Path,
    about: Mapping[str, str],
) -> Case | Refused:
    named = "/".join(part for part in session if part)
    try:
        return Case(
            images=tuple(_only(found, directory) for found in images),
            patient=session[0],
            labels=_labels(about, settings),
            mask=_only(masks, directory) if masks else "",
            values=tuple(_value(about.get(column, "")) for column in settings.values.values()),
        )
    except UnusableCase as error:
        return Refused(image=named, code=error.code)


def _only(found: list[Path], directory: Path) -> str:
    if not found:
        raise UnusableCase("missing_image")
    if len(found) > 1:
        raise UnusableCase("several_images")
    return inside(found[0].relative_to(directory).as_posix())


def _labels(about: Mapping[str, str], settings: Bids) -> tuple[str, ...] | None:
    value = _value(about.get(settings.label, "")) if settings.label else ""
    if not value:
        return None
    if settings.classes and value not in settings.classes:
        raise UnusableCase("unknown_label")
    return (settings.classes.get(value, value),)


def _value(cell: str) -> str:
    return "" if cell == "n/a" else cell  # BIDS writes what is missing so
