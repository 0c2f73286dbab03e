"""What was fetched from the PACS: files in ``private/pacs``, and an index by which label tables join them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from client.files import private_directory, write_private
from client.site import Site
from common.errors import StateError

INDEX: Final = "index.jsonl"
_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*")
_MAX_UID: Final = 64


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series of the PACS, as far as it is at the site; nothing else is kept beside its files.

    Attributes:
        study, series: their UIDs.
        accession, patient: accession number and patient id; "" where the PACS tells none.
        modality, description: such as ``CT``, and the description of the series; "" where there is none.
        directory: the folder of its files, relative to the site directory.
        num_instances: files that are there.
        num_expected: instances that the PACS had when it was asked; ``None`` before it was.
        not_given: UID of each instance that the PACS had and could not give (or UID of the series and the
            place, where it could not even tell that), with the code of the reason.
    """

    study: str
    series: str
    accession: str
    patient: str
    modality: str
    description: str
    directory: str
    num_instances: int
    num_expected: int | None
    not_given: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether everything is there that the PACS had."""
        return self.num_expected is not None and self.num_instances >= self.num_expected


def index(site: Site) -> Sequence[Series]:
    """Returns the series of which at least one file is there, by study and series.

    Raises:
        StateError: the index is damaged; the next ``fetch`` writes a new one.
    """
    return [one for one in known(site).values() if one.num_instances > 0]


def known(site: Site) -> dict[str, Series]:
    """Returns what the index lists, also series of which no file is there, by series UID.

    Raises:
        StateError: as ``index``.
    """
    path = home(site) / INDEX
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [_from_tree(tree, site) for tree in lines]
    except (ValueError, TypeError, KeyError):
        raise StateError(
            f"Expected the index of the images from the PACS in {path}, found something else; remove it and "
            "run feverfew-client fetch, which fetches no image again."
        ) from None
    return {one.series: one for one in sorted(found, key=lambda one: (one.study, one.series))}


def digest(site: Site) -> str:
    """Returns the sha256 of the index; of nothing where nothing was fetched."""
    path = home(site) / INDEX
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()


def write(site: Site, all_series: Iterable[Series]) -> None:
    """Replaces the index (mode 0600); the same series with as many files make the same index."""
    found = sorted(all_series, key=lambda one: (one.study, one.series))
    lines = [json.dumps(_to_tree(one, site), ensure_ascii=False) + "\n" for one in found]
    write_private(home(site) / INDEX, content="".join(lines).encode("utf-8"))


def home(site: Site) -> Path:
    """The folder of everything that was fetched."""
    return site.private / "pacs"


def directory_of(site: Site, *, study: str, series: str) -> Path:
    """Makes and returns the folder of a series (mode 0700).

    Raises:
        ValueError: as ``folder``.
    """
    directory = site.directory / folder(study=study, series=series)
    for path in (home(site), directory.parent, directory):
        private_directory(path)
    return directory


def folder(*, study: str, series: str) -> str:
    """Returns where the files of a series are, relative to the site directory.

    Raises:
        ValueError: what is no UID does not become the name of a file.
    """
    if not (is_uid(study) and is_uid(series)):
        raise ValueError("Expected UIDs of a study and a series, found other text.")
    return f"private/pacs/{study}/{series}"


def there(directory: Path) -> set[str]:
    """Returns the instances in a folder: names without ``.dcm``, which a file bears once it is whole."""
    try:
        return {path.stem for path in directory.iterdir() if path.suffix == ".dcm"}
    except FileNotFoundError:
        return set()


def is_uid(text: str) -> bool:
    """Returns whether a text is a DICOM identifier: numbers and dots, 64 characters at most.

    >>> is_uid("1.2.840"), is_uid(".."), is_uid("1.2/3"), is_uid("")
    (True, False, False, False)
    """
    return len(text) <= _MAX_UID and _UID.fullmatch(text) is not None


_KEPT: Final = tuple(one.name for one in fields(Series) if one.name not in ("directory", "num_instances"))


def _to_tree(series: Series, site: Site) -> dict[str, Any]:
    num_instances = len(there(site.directory / series.directory))  # so that the digest changes with the files
    return {name: getattr(series, name) for name in _KEPT} | {"num_instances": num_instances}


def _from_tree(tree: Any, site: Site) -> Series:
    kept = {name: tree[name] for name in _KEPT}
    directory = folder(study=kept["study"], series=kept["series"])
    return Series(**kept, directory=directory, num_instances=len(there(site.directory / directory)))
