"""What the gateway has refused: counted by reason, and logged as far as a log can take it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Final

logger = logging.getLogger("feverfew.gateway")

LINES_A_SECOND: Final = 10
"""Whoever can reach the port can make it refuse; more lines than this are only counted."""

REASONS: Final = (
    *("tls", "certificate", "connections", "slow"),
    *(
        "path",
        "method",
        "size",
        "revoked",
        "deny list",
        "expired",
        "rate",
        "key",
        "signature",
        "time",
        "replay",
    ),
    *("malformed", "node", "superlink"),
)
"""Why a connection, a head or a body is refused; docs/operation.md explains each."""


class Refusals:
    """Counts since the start of the process. ``counts``: number of refusals by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._second = 0
        self._lines = 0
        self._silent = 0

    def note(self, reason: str, *, who: object, what: str) -> None:
        """Counts a refusal and logs it, unless too many were logged in this second.

        Args:
            reason: one of ``REASONS``.
            who: a site's name, an address.
            what: what was asked, printable.
        """
        self.counts[reason] += 1
        second = int(time.monotonic())
        if second != self._second:
            if self._silent:
                logger.warning("refused %d more", self._silent)
            self._second, self._lines, self._silent = second, 0, 0
        self._lines += 1
        if self._lines > LINES_A_SECOND:
            self._silent += 1
            return
        logger.warning("refused %s from %s: %s", what, who, reason)
