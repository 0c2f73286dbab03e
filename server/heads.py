"""What the coordinator remembers of each site's ledger: its last row, presented to the site at the next run.

A site whose ledger was rolled back together with everything else on its disk finds it out here. The rows
themselves never leave the site.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from flwr.app import RecordDict

from common import durable, exchange
from common.chain import Head
from common.errors import InvalidReply


class Heads:
    """One file a site, ``NAME.json``, in a directory that outlives runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, site: str) -> Head | None:
        """Returns the last row that a site sent; None where it never sent one, or the file is damaged."""
        carrier = RecordDict()
        try:
            exchange.attach_head(carrier, Head(**json.loads(self._path(site).read_text(encoding="ascii"))))
            return exchange.detach_head(carrier)  # what could not be sent is damaged
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, site: str, head: Head | None) -> None:
        """Keeps what a site sent, if it is later than what is kept."""
        if head is None:
            return
        known = self.of(site)
        if known is not None and known.number >= head.number:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        durable.rewrite(self._path(site), json.dumps(asdict(head)).encode())

    def _path(self, site: str) -> Path:
        return self._directory / f"{site}.json"


def taken_from(content: RecordDict) -> Head | None:
    """Takes the head out of a reply; None where it has none.

    Raises:
        InvalidReply: code ``records``: something else is in its place.
    """
    try:
        return exchange.detach_head(content)
    except ValueError:
        raise InvalidReply("records") from None
