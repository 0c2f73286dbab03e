"""Cohorts that a process keeps open from task to task, as many as fit.

An open cohort holds its store on disk, a file, and some hundred bytes a case in memory. A hospital has one; a
worker of a simulation has those of its sites, however many they are, within bounds. Pixels are in memory of
the one that was asked for last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client import cache
from client.cohort import Cohort

MOST_CASES: Final = 50_000
"""About 25 MB, without their pixels."""
MOST_COHORTS: Final = 600
"""A process may have 1,024 files open, unless its system says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open cohort, and what was written down of it: (run, plan, part) for the use of a part, with an empty
    part for the cohort itself."""

    cohort: Cohort
    noted: set[tuple[str, str, str]] = field(default_factory=set)


class OpenCohorts:
    """One cohort for each site directory; those longest unused are closed when they are too many.

    Args:
        most_cases: of all that are open; one is open, however large it is.
        most_cohorts: open at a time.
    """

    def __init__(self, *, most_cases: int = MOST_CASES, most_cohorts: int = MOST_COHORTS) -> None:
        self._most_cases, self._most_cohorts = most_cases, most_cohorts
        self._open: OrderedDict[Path, tuple[Hashable, Opened]] = OrderedDict()
        self._cases = 0
        self._latest: Path | None = None

    def __len__(self) -> int:
        return len(self._open)

    def get(self, directory: Path, wanted: Hashable, make: Callable[[], Cohort]) -> Opened:
        """Returns the cohort of a site as it is wanted, opened anew where it is open in another way."""
        if directory != self._latest:
            self._let_go_of_pixels()
            self._latest = directory
        known = self._open.get(directory)
        if known is not None and known[0] == wanted:
            self._open.move_to_end(directory)
            return known[1]
        self._close(directory)
        opened = Opened(cohort=make())
        self._open[directory] = (wanted, opened)
        self._cases += opened.cohort.offered
        while self._are_too_many():
            self._close(next(iter(self._open)))
        return opened

    def _let_go_of_pixels(self) -> None:
        if self._latest is not None and self._latest in self._open:
            _, opened = self._open[self._latest]
            for part in opened.cohort.parts.values():
                cache.let_go(part.images)

    def _are_too_many(self) -> bool:
        has_too_many_cases = self._cases > self._most_cases and len(self._open) > 1
        return has_too_many_cases or len(self._open) > self._most_cohorts

    def _close(self, directory: Path) -> None:
        known = self._open.pop(directory, None)
        if known is not None:
            self._cases -= known[1].cohort.offered
