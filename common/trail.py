"""The trail: an append-only log of events, one JSON object a line (``events.jsonl``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Trail:
    """Appends events to a file; whole lines only, so a reader may follow it while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def record(self, event: str, **fields: Any) -> None:
        """Appends one event with its time (UTC, milliseconds)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}, allow_nan=False)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yields what was recorded so far."""
        return read(self._path)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a trail; a line that is still being written is left out."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
