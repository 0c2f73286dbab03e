"""Joins the rows of a label table with what was fetched from the PACS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from client import wildcard
from common.errors import UnusableCase
from common.value import Name, Value

if TYPE_CHECKING:  # its module needs the site's settings, which need this one
    from client.pacs import Series

Pattern = Annotated[str, Field(min_length=1, max_length=200)]


class PacsJoin(Value):
    """How the images of a row are found among the fetched series.

    ``by``: what the cells of ``images`` hold, accession numbers, study UIDs or patient ids. ``series``: for
    each image the description of its series; ``*`` and ``?`` stand for any text and any letter. ``case``:
    ``series`` where a series is one image, a volume; ``instance`` where each of its files is a case of its
    own, as in radiography.
    """

    by: Literal["accession", "study", "patient"]
    series: dict[Name, Pattern]
    case: Literal["series", "instance"]


class Archive:
    """The fetched series of a site, by what a table names them by."""

    def __init__(self, fetched: Sequence[Series], *, by: str, directory: Path) -> None:
        self._directory = directory
        self._by_key: defaultdict[str, list[Series]] = defaultdict(list)
        for series in fetched:
            self._by_key[getattr(series, by)].append(series)

    def images(self, keys: Mapping[str, str], join: PacsJoin) -> list[tuple[str, ...]]:
        """Returns the images of each case of a row, relative to the site directory.

        Args:
            keys: by image, what the table's cell says.

        Raises:
            UnusableCase: ``not_in_pacs``, ``ambiguous_series`` or ``incomplete_series``.
        """
        if join.case == "instance":
            ((name, key),) = keys.items()
            fitting = self._fitting(key, join.series[name])
            return [(file,) for series in fitting for file in self._files(series)]
        return [tuple(self._only(key, join.series[name]).directory for name, key in keys.items())]

    def _only(self, key: str, pattern: str) -> Series:
        fitting = self._fitting(key, pattern)
        if len(fitting) > 1:
            raise UnusableCase("ambiguous_series", f"Expected one series of a row, found {len(fitting)}.")
        if not fitting[0].is_complete:
            raise UnusableCase("incomplete_series", "Expected all instances of the series, found some.")
        return fitting[0]

    def _fitting(self, key: str, pattern: str) -> list[Series]:
        found = [one for one in self._by_key.get(key, []) if wildcard.matches(pattern, one.description)]
        if not found:
            raise UnusableCase("not_in_pacs", "Expected a fetched series of the row, found none.")
        return found

    def _files(self, series: Series) -> list[str]:
        folder = self._directory / series.directory
        return sorted(f"{series.directory}/{path.name}" for path in folder.glob("*.dcm"))
