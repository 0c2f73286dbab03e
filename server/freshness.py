"""Signed times: each of them counts once, and only near the time that it names.

A site signs the time of every request. Whoever has such a signature may not use it again; Flower would let
them, for 300 s.
"""

from __future__ import annotations

import datetime
import heapq
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common import flower

PAST_SECONDS: Final = flower.TIMESTAMP_TOLERANCE
FUTURE_SECONDS: Final = flower.SYSTEM_TIME_TOLERANCE
EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MICROSECOND: Final = datetime.timedelta(microseconds=1)


def microseconds(stamp: bytes) -> int:
    """Returns the time that a site has signed, in microseconds since 1970.

    Raises:
        ValueError: no time in ISO form with its zone.

    >>> microseconds(b"1970-01-01T00:00:01+00:00"), microseconds(b"1970-01-01T01:00:01+01:00")
    (1000000, 1000000)
    """
    time = datetime.datetime.fromisoformat(stamp.decode("ascii"))
    if time.tzinfo is None:
        raise ValueError("expected a time with its zone")
    return (time - EPOCH) // MICROSECOND


@dataclass(kw_only=True)
class Seen:
    """The times that one key has signed, in microseconds; up to ``floor`` all are as good as seen."""

    floor: int
    times: set[int] = field(default_factory=set)
    in_order: list[int] = field(default_factory=list)

    def take(self, time: int, *, oldest: int) -> bool:
        """Takes a time that was not seen before; False for others.

        What is older than ``oldest`` is forgotten, and nothing as old is taken again, whatever clocks do.
        """
        while self.in_order and self.in_order[0] < oldest:
            forgotten = heapq.heappop(self.in_order)
            self.times.discard(forgotten)
            self.floor = max(self.floor, forgotten)
        if time <= self.floor or time in self.times:
            return False
        self.times.add(time)
        heapq.heappush(self.in_order, time)
        return True


class Marks:
    """The latest time that each key has signed, in a file: a gateway that was killed leaves it to the next.

    One line for each key, always as long, so that a mark is overwritten where it stands.
    """

    _LINE: Final = 50 + 1 + 16 + 1
    _FORM: Final = re.compile(r"(SHA256:\S{43}) (\d{16})\n")

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        self._next = len(content) // self._LINE  # a line that was cut off is written over
        self._lines: dict[str, int] = {}
        self._found: dict[str, int] = {}
        for number in range(self._next):
            line = content[number * self._LINE : (number + 1) * self._LINE].decode("ascii", "replace")
            if match := self._FORM.fullmatch(line):
                self._lines[match[1]], self._found[match[1]] = number, int(match[2])

    def found(self, key: str) -> int:
        """Returns the mark of a key when the file was opened; 0 where there was none."""
        return self._found.get(key, 0)

    def move(self, key: str, mark: int) -> None:
        """Writes the mark of a key; it is safe from the death of this process at once."""
        if key not in self._lines:
            self._lines[key] = self._next
            self._next += 1
        os.pwrite(self._file, f"{key} {mark:016d}\n".encode(), self._lines[key] * self._LINE)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Freshness:
    """Which signed times were seen, by key.

    Times are forgotten when nobody would take them any more: memory is bounded by the rate of requests.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._seen: dict[str, Seen] = {}
        self._latest: dict[str, int] = {}

    def take(self, key: str, time: int, *, now: int) -> bool:
        """Takes a time that a key has signed; False where it was taken before, by a former gateway too."""
        seen = self._seen.setdefault(key, Seen(floor=self._marks.found(key)))
        if not seen.take(time, oldest=now - (PAST_SECONDS + FUTURE_SECONDS) * 1_000_000):
            return False
        if time > self._latest.get(key, 0):
            self._latest[key] = time
            self._marks.move(key, time)
        return True


def clock_problem(time: int, *, now: int) -> str:
    """Returns what is wrong with a site's clock, for the site; "" where the time is near enough.

    >>> clock_problem(0, now=3600 * 1_000_000)
    "Expected a clock within 300 s of the coordinator's, found one 3600 s behind; set this computer's clock."
    """
    age_seconds = (now - time) / 1_000_000
    if -FUTURE_SECONDS < age_seconds < PAST_SECONDS:
        return ""
    if age_seconds > 0:
        allowed, found = f"{PAST_SECONDS} s of the coordinator's", f"{age_seconds:.0f} s behind"
    else:
        allowed, found = f"{FUTURE_SECONDS} s of the coordinator's", f"{-age_seconds:.0f} s ahead"
    return f"Expected a clock within {allowed}, found one {found}; set this computer's clock."
