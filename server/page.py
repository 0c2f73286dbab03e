"""Renders ``report.html``: one self-contained page for a hospital or its data protection officer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.template import template

if TYPE_CHECKING:
    from jinja2 import Template

    from server.report import Report

UNKNOWN = "–"

STATUS_WORDS = {
    "completed": "Completed",
    "quorum_not_reached": "Stopped: quorum not reached",
    "failed": "Failed",
}


def render(report: Report) -> str:
    """Returns the whole page as text; everything that comes from outside is escaped."""
    from server import figures  # matplotlib takes half a second to import

    return _template().render(
        report=report,
        status_words=STATUS_WORDS[report.status],
        story=story(report),
        classes=report.plan.get("classes", ()),
        is_binary=_is_binary(report.plan),
        headline=report.headline,
        landmarks=landmarks(report),
        quorum=report.plan.get("quorum"),
        planned_rounds=report.plan.get("rounds"),
        target=report.plan.get("privacy", {}).get("target_epsilon"),
        sections=sections(report.plan),
        figures={
            "loss": figures.loss_curve(report),
            "headline": figures.headline_curve(report),
            "answers": figures.answers_by_round(report),
            "roc": figures.roc_curve(report),
            "sites": figures.headline_by_site(report),
            "epsilon": figures.epsilon_by_site(report),
        },
    )


@lru_cache(maxsize=1)  # to compile it takes as long as to draw the figures
def _template() -> Template:
    filters: dict[str, Callable[..., str]] = {
        "number": number,
        "percent": percent,
        "bounds": bounds,
        "upward": upward,
        "delta": delta,
        "clock": clock,
        "duration": duration,
        "size": size,
    }
    return template(Path(__file__).with_name("report.html"), filters=filters)


def _is_binary(plan: Mapping[str, Any]) -> bool:
    return len(plan.get("classes", ())) <= 2 and plan.get("target", "class") == "class"


def story(report: Report) -> str:
    """One sentence about how the run ended."""
    if report.asks_for_landmarks and report.status == "completed":
        return "Landmarks of intensity were asked of the sites; nothing was trained."
    planned, quorum, done = report.plan.get("rounds"), report.plan.get("quorum"), len(report.rounds)
    if report.status == "completed":
        return f"{'All ' if done == planned else ''}{done} rounds were run and the final model was tested."
    short = [entry for entry in report.rounds if quorum is not None and entry.sites_valid < quorum]
    kept = (
        "The model of the last complete round is kept." if done > len(short) else "There is no trained model."
    )
    if report.status == "quorum_not_reached" and short:
        last = short[-1]
        return (
            f"Round {last.round} of {planned} had valid updates from {last.sites_valid} of the "
            f"{last.sites_asked} sites asked, fewer than the quorum of {quorum}. {kept}"
        )
    reason = " for lack of a quorum" if report.status == "quorum_not_reached" else ""
    return f"The run ended{reason} after {done} of {planned} rounds. {kept}"


def landmarks(report: Report) -> str:
    """Says to which values the percentiles are mapped."""
    found = report.landmarks
    if found is None:
        return "no landmarks"
    pairs = zip(found.percentiles, found.values, strict=True)
    return "percentile to value: " + ", ".join(f"{place:g} to {value:g}" for place, value in pairs)


def sections(plan: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the plan by section: what stands alone first, then each group with its keys.

    Parts of a list, such as the steps of preprocessing, are numbered and keep their order.

    >>> sections({"preprocessing": {"steps": [{"name": "gamma", "gamma": 2.0}, {"name": "resize"}]}})
    [('preprocessing', [('steps 1', 'gamma: gamma 2'), ('steps 2', 'resize')])]
    """
    alone = list(_leaves({key: value for key, value in plan.items() if not isinstance(value, Mapping)}))
    groups = [(key, list(_leaves(value))) for key, value in plan.items() if isinstance(value, Mapping)]
    return [("run", alone), *groups] if alone else groups


def _leaves(tree: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{prefix}{key}.")
        elif _is_a_list_of_parts(value):
            yield from ((f"{prefix}{key} {place}", _shown(part)) for place, part in enumerate(value, start=1))
        else:
            yield f"{prefix}{key}", _shown(value)


def _is_a_list_of_parts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key} {_shown(item)}" for key, item in value.items() if key != "name")
        return ": ".join(text for text in (str(value.get("name", "")), rest) if text)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return UNKNOWN
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | None, digits: int = 3) -> str:
    """
    >>> number(0.91249), number(None)
    ('0.912', '–')
    """
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """
    >>> percent(0.9125)
    '91.2 %'
    """
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def bounds(interval: tuple[float, float] | None) -> str:
    """Rounds outward, so that what is shown holds what was computed.

    >>> bounds((0.8716, 0.9431))
    '0.87 to 0.95'
    """
    if interval is None:
        return UNKNOWN
    low, high = math.floor(interval[0] * 100 + 1e-9) / 100, math.ceil(interval[1] * 100 - 1e-9) / 100
    return f"{low:.2f} to {high:.2f}"


def upward(value: float | None, digits: int = 2) -> str:
    """Rounds up: an epsilon must never look smaller than it is.

    >>> upward(2.981), upward(3.0)
    ('2.99', '3.00')
    """
    if value is None:
        return UNKNOWN
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def delta(value: float | None) -> str:
    """
    >>> delta(1e-4), delta(2.5e-6)
    ('0.0001', '2.5e-06')
    """
    return UNKNOWN if value is None else f"{value:g}"


def clock(moment: datetime) -> str:
    """
    >>> from datetime import UTC
    >>> clock(datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    '2 January 2026, 03:04 UTC'
    """
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname()}"


def duration(seconds: float | None) -> str:
    """
    >>> duration(3.21), duration(125), duration(7322)
    ('3.2 s', '2 min 5 s', '2 h 2 min')
    """
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: int | None) -> str:
    """
    >>> size(512), size(2_500_000)
    ('512 B', '2.5 MB')
    """
    if num_bytes is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
