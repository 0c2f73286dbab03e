"""What is seen of one case when the cohort is checked or frozen: enough to compare it with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from client import content, declared, lettering
from client.case import Case
from client.content import Content
from client.declared import Declared
from client.files import Stamp
from common.errors import UnusableCase

if TYPE_CHECKING:
    from client.image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """One case as it was seen.

    Attributes:
        stamp: of its files, before they were read.
        content: sha256 of its files (``content.Content.digest``).
        pixels: sha256 of the decoded images; of the image files where they were not decoded.
        mask: sha256 of the mask's file; "" where there is none.
        code: why the images cannot be decoded; "" where they can, or nobody tried.
        shapes: for each decoded image (channels, *spatial).
        spacing_mm: for each decoded image along its spatial axes; empty where the file has none.
        lettered: text is suspected in a picture.
        declared: what the header of the first image says; kept in memory only.
    """

    stamp: Stamp
    content: str
    pixels: str
    mask: str
    code: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    spacing_mm: tuple[tuple[float, ...], ...] = ()
    lettered: bool = False
    declared: Declared = Declared()

    def to_text(self) -> str:
        """Returns what may be kept, as JSON: all but what the header says."""
        tree = asdict(self)
        del tree["declared"]
        return json.dumps(tree, separators=(",", ":"))


def from_text(text: str) -> Sight:
    """Returns what ``Sight.to_text`` wrote."""
    tree = json.loads(text)
    for name in ("shapes", "spacing_mm"):
        tree[name] = tuple(map(tuple, tree[name]))
    return Sight(**{**tree, "stamp": tuple(tree["stamp"])})


def glance(case: Case, *, directory: Path) -> Sight:
    """Reads the files of a case without decoding them; the same files are the same pixels.

    Raises:
        UnusableCase: a file cannot be read.
    """
    stamp = content.stamp(case, directory=directory)  # the older: a later change is noticed
    return _declared(_read(content.load(case, directory=directory), stamp=stamp), case, directory=directory)


def look(case: Case, *, directory: Path) -> Sight:
    """Reads and decodes a case; what cannot be decoded has a code, and is the same as its copies only.

    Raises:
        UnusableCase: a file cannot be read.
    """
    stamp = content.stamp(case, directory=directory)
    loaded = content.load(case, directory=directory)
    return _declared(_decoded(_read(loaded, stamp=stamp), loaded), case, directory=directory)


def again(before: Sight, case: Case, *, directory: Path) -> Sight:
    """Returns what was seen before, with what the header says."""
    return _declared(before, case, directory=directory)


def _read(loaded: Content, *, stamp: Stamp) -> Sight:
    return Sight(
        stamp=stamp,
        content=loaded.digest,
        pixels=Content(images=loaded.images, mask=None).digest,
        mask="" if loaded.mask is None else hashlib.sha256(loaded.mask).hexdigest(),
    )


def _declared(sight: Sight, case: Case, *, directory: Path) -> Sight:
    return replace(sight, declared=declared.declared(directory / case.image))


def _decoded(sight: Sight, loaded: Content) -> Sight:
    from client import images  # its decoders take long to import

    try:
        decoded = [images.decode(*one) for one in loaded.images]
    except UnusableCase as error:
        return replace(sight, code=error.code)
    return replace(
        sight,
        pixels=_digest(decoded),
        shapes=tuple(image.array.shape for image in decoded),
        spacing_mm=tuple(tuple(image.spacing_mm or ()) for image in decoded),
        lettered=any(lettering.is_suspected(one.array) for one in decoded if one.array.ndim == 3),
    )


def _digest(decoded: Sequence[Image]) -> str:
    """Returns the sha256 of shapes and values, after rescale and window (``image.Image``)."""
    summed = hashlib.sha256()
    for image in decoded:
        summed.update(repr(image.array.shape).encode())
        summed.update(image.array.tobytes())
    return summed.hexdigest()
