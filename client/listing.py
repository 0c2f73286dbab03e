"""Where a site's cases are listed: in a table, or by folders and names of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from client import bids, files, folders, pairs, table
from client.bids import Bids
from client.case import Case, PatientIs, Refused
from client.folders import Folders
from client.pairs import Pairs
from client.table import Table
from common.value import canonical_json

if TYPE_CHECKING:  # its module needs the site's settings, which need this one
    from client.pacs import Series

Listing = Annotated[Table | Folders | Pairs | Bids, Field(discriminator="kind")]


def rows(
    listing: Listing, *, directory: Path, patient_is: PatientIs, fetched: Sequence[Series] = ()
) -> Iterator[Case | Refused]:
    """Yields every case that is listed, or the reason for which it is not used.

    Args:
        fetched: what is there of the PACS, for a table that names it.

    Raises:
        DataError, ConfigError: as ``table.rows``, ``folders.rows``, ``bids.rows``.
    """
    match listing:
        case Table():
            yield from table.rows(listing, directory=directory, patient_is=patient_is, fetched=fetched)
        case Folders():
            yield from folders.rows(listing, directory=directory, patient_is=patient_is)
        case Pairs():
            yield from pairs.rows(listing, directory=directory, patient_is=patient_is)
        case Bids():
            yield from bids.rows(listing, directory=directory, patient_is=patient_is)


def names_the_pacs(listing: Listing) -> bool:
    """Returns whether a table names what was fetched from the PACS, instead of files."""
    return isinstance(listing, Table) and listing.pacs is not None


def digest(listing: Listing, *, directory: Path) -> str:
    """Returns the sha256 of what lists the cases: the mapping, and the table or the names of all files."""
    summed = hashlib.sha256(canonical_json(listing.model_dump(mode="json")).encode())
    match listing:
        case Table():
            _add_content(summed, directory / listing.file)
        case Bids():
            _add_content(summed, directory / listing.directory / bids.PARTICIPANTS)
    for path in (path for folder in _folders(listing) for path in files.walk(directory / folder)):
        summed.update(f"{path.relative_to(directory).as_posix()}\n".encode())
    return summed.hexdigest()


def _add_content(summed: hashlib._Hash, path: Path) -> None:
    if path.is_file():
        with path.open("rb") as stream:
            summed.update(hashlib.file_digest(stream, "sha256").digest())


def _folders(listing: Listing) -> list[str]:
    match listing:
        case Table():
            return []
        case Pairs():
            return [*listing.images.values(), listing.masks]
    return [listing.directory]
