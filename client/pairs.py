"""Images in one folder, masks of the same names in another: as the Medical Segmentation Decathlon has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from client.case import Case, PatientIs, Refused, inside
from client.folders import Pattern, patient_of, require_pattern
from common.asked import Target
from common.errors import DataError, UnusableCase
from common.value import Name, Value


class Pairs(Value):
    """A folder for each image of a case and one for the masks, with files of equal names.

    ``patient`` is a regular expression that finds the patient in a file's name, such as
    ``^(?P<patient>[^_]+)_``; null with ``patient_is: case``.
    """

    kind: Literal["pairs"]
    images: Annotated[dict[Name, str], Field(min_length=1)]
    masks: Annotated[str, Field(min_length=1)]
    patient: Pattern | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the images of a case."""
        return tuple(self.images)

    @property
    def values(self) -> dict[str, str]:
        """Clinical values: file names have none."""
        return {}

    @property
    def targets(self) -> tuple[Target, ...]:
        """What a plan may be about."""
        return ("mask",)


def rows(settings: Pairs, *, directory: Path, patient_is: PatientIs) -> Iterator[Case | Refused]:
    """Yields the cases in the order of their names; hidden files are no cases.

    Raises:
        ConfigError: ``patient`` does not go with ``patient_is``.
        DataError: a folder is missing.
    """
    require_pattern(settings.patient, patient_is=patient_is)
    folders = [*settings.images.values(), settings.masks]
    for folder in folders:
        if not (directory / folder).is_dir():
            raise DataError(f"Expected a folder {directory / folder}, found none.")
    first = directory / folders[0]
    for name in sorted(path.name for path in first.iterdir() if not path.name.startswith(".")):
        yield _case(name, settings, directory=directory)


def _case(name: str, settings: Pairs, *, directory: Path) -> Case | Refused:
    images = [f"{folder}/{name}" for folder in settings.images.values()]
    try:
        images = [inside(image) for image in images]
        mask = inside(f"{settings.masks}/{name}")
        return Case(
            images=tuple(images),
            patient=patient_of(name, settings.patient) or images[0],
            mask=mask if (directory / mask).exists() else "",
        )
    except UnusableCase as error:
        return Refused(image=images[0], code=error.code)
