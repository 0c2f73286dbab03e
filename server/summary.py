"""The closing table of a run for the terminal."""

from __future__ import annotations

import itertools
from typing import Final

from rich.table import Table
from rich.text import Text

from server import page
from server.report import Report

MOST_ROWS: Final = 50
"""More than a person reads on a terminal, and rich takes half a second for a thousand."""


def summary_table(report: Report) -> Table:
    """Returns one row per site: cases used where known, AUROC or Dice, epsilon of budget, rounds.

    Of very many sites only the first are shown. Where landmarks were asked for there is no model, and nothing
    is said of it.
    """
    table = Table(
        title=Text(f"{report.study}: {page.STATUS_WORDS[report.status].lower()}"), caption=_caption(report)
    )
    for name in ("site", "role"):
        table.add_column(name, no_wrap=True)
    measures = () if report.asks_for_landmarks else (report.headline.name, "95 % interval")
    for name in ("cases", *measures, _epsilon_heading(report), "rounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for site in itertools.islice(report.participation, MOST_ROWS):
        table.add_row(*(Text(cell) for cell in _row(report, site)))
    if len(report.participation) > MOST_ROWS:
        table.add_row(f"and {len(report.participation) - MOST_ROWS} more")
    return table


def _row(report: Report, site: str) -> tuple[str, ...]:
    part = report.participation[site]
    result = report.final.per_site.get(site)
    used = str(part.used) if part.used is not None else page.UNKNOWN
    interval = result.interval(report.headline) if result else None
    value = page.number(result.value(report.headline) if result else None)
    measures = () if report.asks_for_landmarks else (value, page.bounds(interval))
    return site, part.role, used, *measures, _epsilon(report, site), str(part.rounds_valid)


def _epsilon(report: Report, site: str) -> str:
    """Epsilon of this run, or of all runs of budget where the site's own files could be read."""
    if report.privacy.unit == "none":
        return "none"
    cost = report.privacy.per_site.get(site)
    if cost is None:
        return page.UNKNOWN
    limit = cost.budget if cost.budget is not None else report.plan.get("privacy", {}).get("target_epsilon")
    spent = cost.total_epsilon if cost.total_epsilon is not None else cost.epsilon
    return page.upward(spent) if limit is None else f"{page.upward(spent)} of {page.upward(limit)}"


def _epsilon_heading(report: Report) -> str:
    budgets = any(cost.budget is not None for cost in report.privacy.per_site.values())
    return "epsilon of budget" if budgets else "epsilon of target"


def _measured(report: Report) -> str:
    final, headline = report.final, report.headline
    told = [f"{headline.name} {page.number(final.value(headline))}"]
    if interval := final.interval(headline):
        told.append(f"(95 % interval {page.bounds(interval)})")
    if (exact := final.exact(headline)) is not None:
        told.append(f"exact {page.number(exact)}")
    return " ".join(told)


def _caption(report: Report) -> Text:
    caption = Text(page.landmarks(report) if report.asks_for_landmarks else _measured(report))
    if report.privacy.unit == "none":
        caption.append("\nNO PRIVACY", style="bold red")
    else:
        epsilon, delta = page.upward(report.privacy.max_epsilon), page.delta(report.privacy.delta)
        caption.append(f"\nepsilon <= {epsilon} at delta {delta}")
    if report.privacy.seeded:
        caption.append("\nepsilon: not valid (seeded)", style="bold red")
    return caption
