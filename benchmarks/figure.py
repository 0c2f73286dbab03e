"""One figure of a benchmark: what was measured, its spread, and what is wanted of it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "FEVERFEW_FIGURES"
"""Names the file to which figures are added, one JSON object a line; ``benchmarks/page.py`` sets it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A median with the least and the greatest of its runs; ``at_most`` or ``at_least`` is wanted of it."""

    name: str
    unit: str
    median: float
    least: float
    most: float
    runs: int
    at_most: float | None
    at_least: float | None

    @property
    def is_met(self) -> bool | None:
        """Says whether the median is as it is wanted; None where nothing is."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return None if self.at_least is None else self.median >= self.at_least

    @property
    def wanted(self) -> str:
        """Returns what is wanted in words; nothing where nothing is."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    @property
    def measured(self) -> str:
        """Returns the median, the spread of several runs, and the unit."""
        unit = f" {self.unit}" if self.unit else ""
        spread = f" ({shown(self.least)} to {shown(self.most)})" if self.runs > 1 else ""
        return f"{shown(self.median)}{spread}{unit}"

    def to_text(self) -> str:
        """Returns one line for a person."""
        return f"{self.name}: {self.measured}" + (f"; wanted {self.wanted}" if self.wanted else "")


def tell(
    name: str,
    values: Sequence[float],
    *,
    unit: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
) -> None:
    """Prints a figure, and adds it to the file that is asked for.

    Args:
        name: what is measured.
        values: of each run, or each pair of runs.
        unit: none for a ratio.
    """
    figure = Figure(
        name=name,
        unit=unit,
        median=statistics.median(values),
        least=min(values),
        most=max(values),
        runs=len(values),
        at_most=at_most,
        at_least=at_least,
    )
    print(figure.to_text(), flush=True)
    if VARIABLE in os.environ:
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure)) + "\n")


def shown(value: float) -> str:
    """Returns a number with three digits that count.

    >>> shown(1.0949), shown(0.2634), shown(173.2), shown(20.04), shown(0.0)
    ('1.09', '0.263', '173', '20.0', '0')
    """
    return f"{value:.0f}" if value == 0 or abs(value) >= 100 else f"{value:#.3g}"
