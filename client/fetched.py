"""What came of a query to the PACS, and how a person is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table

REMEDIES: Final[Mapping[str, str]] = {
    "not_found": "the PACS lists it and does not have it; ask those who run the PACS",
    "forbidden": "the PACS does not let this user see it; ask for the right, or leave it",
    "server_error": "the PACS failed at it again and again; see its own log",
    "no_answer": "the PACS closed the connection again and again; raise timeout_seconds, or see its own log",
    "refused": "the PACS does not take the request; see docs/pacs.md for what it has to support",
    "bad_answer": "what came is no whole DICOM file or no list; see the logs of the PACS and of proxies",
    "other_instance": "the file says that it is another image, and was not kept; tell those who run the PACS",
    "bad_identifier": "the PACS names it by something that is no DICOM UID; tell those who run the PACS",
    "too_large": "more than 2 GiB in one file, or a list of more than 256 MiB",
    "not_listed": "the PACS counts more images in the series than it lists; the listed ones were fetched",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a query; for the site only.

    Attributes:
        studies, series, instances: what the query means.
        there: instances that were at the site before.
        fetched, fetched_bytes: what came now.
        not_given: how often the PACS could not give something that it lists, by code.
        untold: studies or series left out since the PACS does not tell what the query asks of them, by key.
    """

    studies: int
    series: int
    instances: int
    there: int
    fetched: int = 0
    fetched_bytes: int = 0
    not_given: Mapping[str, int] = field(default_factory=dict)
    untold: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the PACS gave everything that was asked of it."""
        return not self.not_given

    def to_tree(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self)


def show(outcome: Outcome, *, console: Console, only_list: bool) -> None:
    """Prints an outcome for a person."""
    console.print(f"{outcome.studies} studies, {outcome.series} series, {outcome.instances} images")
    came = "" if only_list else f"; {outcome.fetched} fetched, {outcome.fetched_bytes / 1e6:.1f} MB"
    console.print(f"{outcome.there} were here before{came}")
    for key, number in outcome.untold.items():
        console.print(
            f"{number} left out: the PACS does not tell their {key}; to take them, make it null in site.yaml"
        )
    if outcome.not_given:
        table = Table(title="not given by the PACS; the next fetch asks again", title_justify="left")
        for name in ("code", "number", "remedy"):
            table.add_column(name, justify="right" if name == "number" else "left")
        for code, number in sorted(outcome.not_given.items()):
            table.add_row(code, str(number), REMEDIES[code])
        console.print(table)
