"""What the gateway has passed and refused, told to the supervisor, which serves the metrics.

The gateway writes a small file every second; what it tells is lost with the process, as counters are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field

from common.value import Value

TELL_SECONDS: Final = 1.0


Number = Annotated[int, Field(ge=0)]


class Traffic(Value):
    """Of one gateway process since its start.

    Attributes:
        passed: number of requests that went on to the SuperLink.
        refused: number of refusals by reason, see ``server.refusals.REASONS``.
        connections: open ones, now.
        sites: with an open connection, now.
    """

    passed: Number
    refused: dict[str, Number]
    connections: Number
    sites: Number

    def write(self, path: Path) -> None:
        """Replaces the file; a full disk leaves the former one, and is no reason to refuse anybody."""
        fresh = path.with_name(f".{path.name}")
        try:
            fresh.write_text(self.model_dump_json(), encoding="ascii")
            os.replace(fresh, path)  # not made durable: it is worth nothing after a crash
        except OSError:
            fresh.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Returns what a gateway has told, or None if none ever did."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):  # ValidationError is one
            return None
