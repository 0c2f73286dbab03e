"""How long the coordinator waits for persons at the sites, and how often it asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

SHORTEST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
PAUSE_FRACTION: Final = 0.05
"""A waiting site is asked again after 5 % of the time that it has waited."""


def pause_seconds(waited_seconds: float) -> float:
    """Returns how long to leave a site alone at which a person has to decide.

    >>> [pause_seconds(waited) for waited in (0, 100, 86400)]
    [0.5, 5.0, 30.0]
    """
    return min(LONGEST_PAUSE_SECONDS, max(SHORTEST_PAUSE_SECONDS, PAUSE_FRACTION * waited_seconds))


def since(former: Mapping[str, str], waiting: Iterable[str]) -> dict[str, str]:
    """Returns since when each site waits (UTC): what was known of it, else now."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {name: former.get(name, now) for name in waiting}


def seconds_left(waiting_since: Mapping[str, str], *, deadline_seconds: float) -> float:
    """Returns what is left of a deadline that counts from when the first site said that it waits.

    By the clock, since the process that asked first may have died; never more than the deadline.
    """
    begun = min(map(datetime.fromisoformat, waiting_since.values()))
    waited = (datetime.now(UTC) - begun).total_seconds()
    return max(0.0, deadline_seconds - max(0.0, waited))
