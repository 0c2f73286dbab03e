"""The trail: an append-only log of events (``events.jsonl``), one JSON object a line, chained by hashes.

Every line has its ``number``, which is its place in the file, and as ``previous`` the sha256 of the line
before: what was changed, removed or moved no longer fits. ``common/seal.py`` signs the chain.

A process may be killed, or the disk be full, in the middle of a line. Nothing is taken out: the next event
gives the half line its end and tells of it in a line of its own, ``line_closed``, whose ``previous`` is the
hash of the half.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from common import durable, schema
from common.chain import GENESIS

logger = logging.getLogger("feverfew.trail")

FILE: Final = "events.jsonl"
SCHEMA: Final = 1
"""Stands in the first line; trails from before it was noted are of the same."""
LINE_CLOSED: Final = "line_closed"
_NOT_LOGGED_IN: Final = 2**32 - 1  # what the kernel says of a process that no login began
_BLOCK_BYTES: Final = 4096  # most lines are shorter, so one read finds the last

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class End:
    """The last line of a trail: its number and its hash; 0 and GENESIS before the first."""

    number: int
    hash: str


class Trail:
    """Appends events to a file; whole lines only, so a reader may follow it while it grows.

    Several processes and threads may append at once. What an event costs does not grow with the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)

    def record(self, event: str, **fields: Any) -> None:
        """Appends one event with its time (UTC, milliseconds)."""
        with self.locked() as descriptor:
            append(descriptor, event, fields)

    def record_if_possible(self, event: str, **fields: Any) -> None:
        """Appends one event; what cannot be written, on a full disk above all, is said in the log only."""
        try:
            self.record(event, **fields)
        except OSError as error:
            logger.error("%s could not be written to the trail %s: %s", event, self._path, error.strerror)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Opens the file, made at the first use, and keeps everybody else out; a killed process lets go.

        Raises:
            SchemaError: a newer Feverfew has begun it.
        """
        with durable.locked(self._path) as descriptor:
            schema.require(_schema(descriptor), newest=SCHEMA, what=f"the trail {self._path}")
            yield descriptor

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields what was recorded so far."""
        return read(self._path)


def append(descriptor: int, event: str, fields: Mapping[str, Any]) -> End:
    """Appends one event to a locked trail and returns its line."""
    text, appended = line(event, fields, after=end(descriptor))
    write(descriptor, text)
    return appended


def end(descriptor: int) -> End:
    """Returns the last line of a locked trail, after closing one that was left half."""
    size = os.fstat(descriptor).st_size
    if not size:
        return End(number=0, hash=GENESIS)
    text, is_ended = _last_line(descriptor, size=size)
    if not is_ended:
        write(descriptor, b"\n")
    event = parse(text)
    number = None if event is None else event.get("number")
    last = End(number=number if isinstance(number, int) else _count_lines(descriptor), hash=line_hash(text))
    if event is not None:
        return last
    closing, last = line(LINE_CLOSED, {}, after=last)
    write(descriptor, closing)
    return last


def line(event: str, fields: Mapping[str, Any], *, after: End) -> tuple[bytes, End]:
    """Returns the line of an event that is to follow another, with its end, and what it is the end of."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    first = {} if after.number else {"schema": SCHEMA}
    tree = {"number": 0, "time": now, "event": event, **first, **fields}
    tree |= {"number": after.number + 1, "previous": after.hash}  # a field cannot take their place
    text = json.dumps(tree, allow_nan=False).encode("ascii")
    return text + b"\n", End(number=after.number + 1, hash=line_hash(text))


def write(descriptor: int, text: bytes) -> None:
    """Appends to a locked trail what ``line`` returned after its end."""
    while text:
        text = text[os.write(descriptor, text) :]


def parse(line: bytes) -> Event | None:
    """Returns the event of a line; None where it is none, as half a line.

    >>> parse(b'{"event": "sta'), parse(b'{"event": "started"}')
    (None, {'event': 'started'})
    """
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def read(path: Path) -> Iterator[Event]:
    """Yields the events of a trail; a line that is half, or still being written, is left out."""
    with open(path, "rb") as file:
        for line in file:
            event = parse(line) if line.endswith(b"\n") else None
            if event is not None:
                yield event


def line_hash(line: bytes) -> str:
    """Returns the sha256 of a line without its end, 64 hexadecimal digits."""
    return hashlib.sha256(line).hexdigest()


def account() -> str:
    """Returns the account of the person: of the login, which ``sudo`` leaves, else of the process."""
    try:
        user = int(Path("/proc/self/loginuid").read_text())
    except (OSError, ValueError):
        user = _NOT_LOGGED_IN
    user = os.getuid() if user == _NOT_LOGGED_IN else user
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def schema_of(first_line: bytes) -> object:
    """Returns the schema version of the trail that begins with a line."""
    return (parse(first_line) or {}).get("schema", SCHEMA)


def _schema(descriptor: int) -> object:
    return schema_of(os.pread(descriptor, _BLOCK_BYTES, 0).partition(b"\n")[0])


def _last_line(descriptor: int, *, size: int) -> tuple[bytes, bool]:
    """Returns the last line of a file that has one, and whether it has its end."""
    length = _BLOCK_BYTES
    while True:
        start = max(0, size - length)
        block = os.pread(descriptor, size - start, start)
        text = block.removesuffix(b"\n")
        before = text.rfind(b"\n")
        if before >= 0 or start == 0:
            return text[before + 1 :], block.endswith(b"\n")
        length *= 4


def _count_lines(descriptor: int) -> int:
    """Reads the whole file; only where the last line does not say its number."""
    count, place = 0, 0
    while block := os.pread(descriptor, 2**20, place):
        count, place = count + block.count(b"\n"), place + len(block)
    return count
