"""A case as the hospital lists it, and a row that is not used."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Literal

from common.errors import UnusableCase

PatientIs = Literal["column", "case"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One case; paths are relative to the site directory.

    Attributes:
        images: a file, or a directory with the files of one DICOM series, for each of the listing's inputs.
        patient: whose it is.
        labels: names of classes, sorted; one where a case has one class, none where it is of no class;
            ``None`` where the listing says nothing.
        mask: file with the class of each pixel; "" where there is none.
        values: for each of the listing's clinical values the text; "" where it is missing.
    """

    images: tuple[str, ...]
    patient: str
    labels: tuple[str, ...] | None = None
    mask: str = ""
    values: tuple[str, ...] = ()

    @property
    def image(self) -> str:
        """The first image, by which the case is named at the site."""
        return self.images[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that is not used, with the code of the reason."""

    image: str
    code: str


def inside(path: str) -> str:
    """Returns a path below the site directory in its one form.

    Raises:
        UnusableCase: ``bad_path``: absolute, leading outside, or not printable.
    """
    if not path.isprintable() or path.startswith("/") or ".." in path.split("/"):
        raise UnusableCase("bad_path", "Expected a path below the site directory, found another.")
    return posixpath.normpath(path)
