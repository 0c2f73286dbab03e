"""The trail of a site: which plans were approved, what was asked, charged, sent and refused, and when.

It stays at the site, and all the same it names no case and no patient: it has ids of runs, plans and tasks,
accounts of this machine, and codes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from client.files import private_directory
from client.site import Site
from common import keys, seal, trail
from common.errors import StateError
from common.seal import Finding, Seal
from common.trail import Trail

logger = logging.getLogger("feverfew.site")


def record(site: Site, event: str, **fields: Any) -> None:
    """Appends an event."""
    Trail(private_directory(site.state) / trail.FILE).record(event, **fields)


def record_if_possible(site: Site, event: str, **fields: Any) -> None:
    """Appends an event of which a full disk must not end the work; says in the log if it was not possible."""
    Trail(_path(site)).record_if_possible(event, **fields)


def sign(site: Site) -> None:
    """Signs all events so far. A broken trail is left unsigned, said in the log, and stops no work: it holds
    no promise to patients, as the ledger does."""
    try:
        seal.sign(_path(site), _seal(site))
    except StateError as error:
        logger.error("%s", error)
    except OSError as error:
        logger.error("the trail could not be signed: %s", error.strerror)


def verify(site: Site) -> Finding:
    """Says whether the trail is unbroken."""
    key = keys.read_private(site.private / "site.key").public_key()
    return seal.verify(_path(site), name=_name(site), key=key, head=head_path(site))


def head_path(site: Site) -> Path:
    """Returns the file that remembers the last signed line; beside the state, as the ledger's."""
    return site.state.with_name("trail.head")


def _seal(site: Site) -> Seal:
    return Seal(name=_name(site), key_file=site.private / "site.key", head=head_path(site))


def _name(site: Site) -> str:
    return f"site {site.name}"


def _path(site: Site) -> Path:
    return site.state / trail.FILE
