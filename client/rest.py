"""When a site does not work: paused by a person, or outside of its hours.

A site that rests is away for the coordinator; runs go on without it. The task at hand is finished first.
"""

from __future__ import annotations

from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import StringConstraints, model_validator

from client.files import private_directory
from common import durable
from common.value import Value

Clock = Annotated[str, StringConstraints(strict=True, pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
"""Such as "19:00": a text, since YAML reads 19:00 without quotes as the number 1140."""

PAUSED: Final = "paused"


class Hours(Value):
    """The hours of a day, by the clock of this machine, in which a site works.

    Where ``end`` is the earlier one, they go over midnight.
    """

    begin: Clock
    end: Clock

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.begin == self.end:
            raise ValueError(f"expected hours that begin and end at different times, found {self.end} twice")
        return self

    def contain(self, now: time) -> bool:
        """Says whether a time of day is within the hours; the end is not.

        >>> night = Hours(begin="19:00", end="07:00")
        >>> [night.contain(time(hour)) for hour in (6, 7, 18, 19, 23)]
        [True, False, False, True, True]
        """
        begin, end = time.fromisoformat(self.begin), time.fromisoformat(self.end)
        return begin <= now < end if begin < end else now >= begin or now < end


def reason(state: Path, hours: Hours | None, *, now: datetime) -> str:
    """Returns why a site rests, in a few words; "" while it works.

    Args:
        state: the site's state directory.
        now: the time by the clock of this machine.
    """
    if (state / PAUSED).exists():
        return PAUSED
    if hours is not None and not hours.contain(now.time()):
        return f"outside of its hours, {hours.begin} to {hours.end}"
    return ""


def pause(state: Path) -> None:
    """Lets the site rest until ``resume``, whatever is started again in between."""
    durable.write(private_directory(state) / PAUSED, b"")


def resume(state: Path) -> None:
    """Lets a paused site work again."""
    (state / PAUSED).unlink(missing_ok=True)
