"""Cohorts that a process keeps open from task to task, as many as fit.

An open cohort holds its store on disk, and some hundred bytes a case in memory. A hospital has one; a worker
of a simulation has those of its sites, however many they are, within one bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client.cohort import Cohort

MOST_CASES: Final = 20_000
"""About 14 MB, and as many of their pixels as tasks have touched."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open cohort, and which uses of it (run, plan, part) were written down."""

    cohort: Cohort
    noted: set[tuple[str, str, str]] = field(default_factory=set)


class OpenCohorts:
    """One cohort for each site directory; those longest unused are closed when all have too many cases.

    Args:
        most_cases: of all that are open; one is open, however large it is.
    """

    def __init__(self, *, most_cases: int = MOST_CASES) -> None:
        self._most_cases = most_cases
        self._open: OrderedDict[Path, tuple[Hashable, Opened]] = OrderedDict()
        self._cases = 0

    def __len__(self) -> int:
        return len(self._open)

    def get(self, directory: Path, wanted: Hashable, make: Callable[[], Cohort]) -> Opened:
        """Returns the cohort of a site as it is wanted, opened anew where it is open in another way."""
        known = self._open.get(directory)
        if known is not None and known[0] == wanted:
            self._open.move_to_end(directory)
            return known[1]
        self._close(directory)
        opened = Opened(cohort=make())
        self._open[directory] = (wanted, opened)
        self._cases += opened.cohort.offered
        while self._cases > self._most_cases and len(self._open) > 1:
            self._close(next(iter(self._open)))
        return opened

    def _close(self, directory: Path) -> None:
        known = self._open.pop(directory, None)
        if known is not None:
            self._cases -= known[1].cohort.offered
