"""Where a site's cases are listed: in a table, or by folders and names of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from client import bids, folders, pairs, table
from client.bids import Bids
from client.case import Case, PatientIs, Refused
from client.folders import Folders
from client.pairs import Pairs
from client.table import Table

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
    """Returns the sha256 of what lists the cases: the table, or the names of all files."""
    summed = hashlib.sha256()
    match listing:
        case Table():
            path = directory / listing.file
            if path.is_file():
                with path.open("rb") as stream:
                    return hashlib.file_digest(stream, "sha256").hexdigest()
        case _:
            for path in sorted(
                path for folder in _folders(listing) for path in (directory / folder).rglob("*")
            ):
                summed.update(f"{path.relative_to(directory).as_posix()}\n".encode())
    return summed.hexdigest()


def _folders(listing: Folders | Pairs | Bids) -> list[str]:
    return [*listing.images.values(), listing.masks] if isinstance(listing, Pairs) else [listing.directory]
