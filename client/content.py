"""The files of a case: their bytes, what they hash to, and by what a change of them is seen."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from client import files
from client.case import Case
from client.files import MAX_BYTES, Stamp
from common.errors import UnusableCase


@dataclass(frozen=True, kw_only=True)
class Content:
    """The bytes of a case.

    Attributes:
        images: for each image the content of its file, or of the files of its series.
        mask: content of the mask's file; ``None`` where the case has none.
    """

    images: tuple[tuple[bytes, ...], ...]
    mask: bytes | None

    @property
    def digest(self) -> str:
        """sha256 of the only file, or of the hashes of all files; 64 hexadecimal digits."""
        if self.mask is None and len(self.images) == len(self.images[0]) == 1:
            return hashlib.sha256(self.images[0][0]).hexdigest()
        summed = hashlib.sha256()
        for image in (*self.images, () if self.mask is None else (self.mask,)):
            summed.update(len(image).to_bytes(8, "big"))
            for one in image:
                summed.update(hashlib.sha256(one).digest())
        return summed.hexdigest()


def load(case: Case, *, directory: Path) -> Content:
    """Reads the files of a case.

    Raises:
        UnusableCase: ``missing_file``, ``not_readable``, ``empty_folder`` or ``too_large``.
    """
    return Content(
        images=tuple(tuple(map(files.load, _paths(directory / image))) for image in case.images),
        mask=files.load(directory / case.mask) if case.mask else None,
    )


def stamp(case: Case, *, directory: Path) -> Stamp:
    """Returns sum of sizes, and latest mtime_ns and ctime_ns: as long as they stay, the content stays.

    Raises:
        UnusableCase: as ``load``.
    """
    paths = [os.path.join(directory, image) for image in case.images]  # a Path takes longer than its stamp
    stamps = [one for path in paths for one in _stamps(path)]
    if case.mask:
        stamps.append(files.stamp(directory / case.mask))
    size = sum(one[0] for one in stamps)
    if size > MAX_BYTES:
        raise UnusableCase("too_large", f"Expected at most {MAX_BYTES} bytes, found {size}.")
    return size, max(one[1] for one in stamps), max(one[2] for one in stamps)


def _stamps(image: str) -> list[Stamp]:
    """Returns the stamp of the file, which is looked at once, or of each file of the folder."""
    try:
        return [files.stamp(image)]
    except UnusableCase:
        return [files.stamp(path) for path in _paths(Path(image))]


def _paths(image: Path) -> list[Path]:
    """Returns the file, or the files of a folder in the order of their names; hidden ones are none."""
    if not image.is_dir():
        return [image]
    found = sorted(path for path in files.listed(image) if not path.name.startswith("."))
    if not found:
        raise UnusableCase("empty_folder", "Expected the files of a series, found an empty folder.")
    return found
