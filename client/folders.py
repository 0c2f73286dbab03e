"""A folder for each class: cases listed by where their files lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from client import files
from client.case import Case, PatientIs, Refused, inside
from common.asked import Class, Target
from common.errors import ConfigError, DataError, UnusableCase
from common.value import Value


def _checked(text: str) -> str:
    try:
        groups = re.compile(text).groupindex
    except re.error as error:
        raise ValueError(f"expected a regular expression ({error})") from None
    if "patient" not in groups:
        raise ValueError("expected a group (?P<patient>...) in the pattern")
    return text


Pattern = Annotated[str, AfterValidator(_checked)]
"""A regular expression with a group ``patient``."""


class Folders(Value):
    """A folder for each class in ``directory``; what is in it, at any depth and behind links too,
    are its cases.

    ``classes`` says which folder means which class. ``patient`` is a regular expression that finds the
    patient in a file's path below its class folder, such as ``^(?P<patient>[^_/]+)``; null with
    ``patient_is: case``. ``series``: every folder that holds files is one case, a DICOM series.
    """

    kind: Literal["folders"]
    directory: Annotated[str, Field(min_length=1)]
    classes: Annotated[dict[str, Class], Field(min_length=1)]
    patient: Pattern | None
    series: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the images of a case."""
        return ("image",)

    @property
    def values(self) -> dict[str, str]:
        """Clinical values: folders have none."""
        return {}

    @property
    def targets(self) -> tuple[Target, ...]:
        """What a plan may be about."""
        return ("class",)


def rows(settings: Folders, *, directory: Path, patient_is: PatientIs) -> Iterator[Case | Refused]:
    """Yields the cases of all class folders, in the order of their paths; hidden files are no cases.

    Raises:
        ConfigError: ``patient`` does not go with ``patient_is``.
        DataError: a class has no folder.
    """
    require_pattern(settings.patient, patient_is=patient_is)
    for folder, name in sorted(settings.classes.items()):
        root = directory / settings.directory / folder
        if not root.is_dir():
            raise DataError(f"Expected a folder of the class {name} at {root}, found none.")
        for path in sorted(_cases(root, series=settings.series)):
            yield _case(path, root=root, directory=directory, label=name, pattern=settings.patient)


def _cases(root: Path, *, series: bool) -> set[Path]:
    found = {path for path in files.walk(root) if not _is_hidden(path, root)}
    return {path.parent for path in found} if series else found


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _case(path: Path, *, root: Path, directory: Path, label: str, pattern: str | None) -> Case | Refused:
    image = path.relative_to(directory).as_posix()
    below = path.relative_to(root).as_posix()
    try:
        image = inside(image)
        return Case(images=(image,), patient=patient_of(below, pattern) or image, labels=(label,))
    except UnusableCase as error:
        return Refused(image=image, code=error.code)


def require_pattern(pattern: str | None, *, patient_is: PatientIs) -> None:
    """Checks that the settings say who the patient is.

    Raises:
        ConfigError: no pattern, or one that has no effect.
    """
    if (pattern is None) != (patient_is == "case"):
        raise ConfigError(
            f"Expected cases.patient to say who the patient is, and null with patient_is: case; found "
            f"{pattern!r} with patient_is: {patient_is}."
        )


def patient_of(name: str, pattern: str | None) -> str:
    """Returns the patient that a pattern finds in a name; "" without a pattern.

    Raises:
        UnusableCase: ``missing_patient``: it finds none.
    """
    if pattern is None:
        return ""
    found = re.search(pattern, name)
    if found is None or not found["patient"]:
        raise UnusableCase("missing_patient")
    return found["patient"]
