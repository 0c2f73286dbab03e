"""Patients who withdrew: ``private/withdrawn.json``. No task that begins later uses their cases.

The file is a history: nothing is taken out, so that it says who withdrew when, also after an undo.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from client import files
from client.site import Site
from common import durable
from common.errors import StateError, UserError
from common.value import Value

CODE: Final = "withdrawn"

Stamp = tuple[int, int]


class Event(Value):
    """A patient withdrew, or that was undone, at a time (UTC)."""

    patient: str
    event: Literal["withdrawn", "undone"]
    time: datetime


_HISTORY = TypeAdapter(list[Event])


def stamp(site: Site) -> Stamp:
    """Returns size and mtime_ns of the history, which only ever grows: whatever changed changes them."""
    try:
        status = _path(site).stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def withdrawn(site: Site) -> dict[str, datetime]:
    """Returns the patients who are withdrawn, and since when.

    Raises:
        StateError: the history is damaged; no case may be used before it is restored.
    """
    since: dict[str, datetime] = {}
    for event in history(site):
        if event.event == "undone":
            since.pop(event.patient, None)
        else:
            since.setdefault(event.patient, event.time)
    return since


def history(site: Site) -> list[Event]:
    """Returns all events, the oldest first.

    Raises:
        StateError: the history is damaged.
    """
    path = _path(site)
    try:
        return _HISTORY.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError:
        raise StateError(
            f"Expected the history of withdrawals in {path}, found damage; restore it from a backup. Without "
            "it a patient who withdrew would be used again."
        ) from None


def withdraw(site: Site, *, patient: str) -> None:
    """Excludes a patient from every task that begins later; durable on return, and done at most once.

    A patient whom the site does not know is excluded too: an export may bring them later.

    Raises:
        UserError: no patient is named.
        StateError: the history is damaged.
    """
    _append(site, patient=patient, event="withdrawn")


def undo(site: Site, *, patient: str) -> None:
    """Takes a withdrawal back, such as that of a wrong patient.

    Raises:
        UserError: the patient is not withdrawn.
        StateError: the history is damaged.
    """
    if patient not in withdrawn(site):
        raise UserError("Expected a patient who is withdrawn, found another; see withdraw --list.")
    _append(site, patient=patient, event="undone")


def _append(site: Site, *, patient: str, event: Literal["withdrawn", "undone"]) -> None:
    if not patient:
        raise UserError("Expected a patient, found an empty text.")
    with FileLock(files.private_directory(site.private) / "withdrawn.lock", mode=0o600):
        if (event == "withdrawn") is (patient in withdrawn(site)):
            return
        now = Event(patient=patient, event=event, time=datetime.now(UTC))
        _write(_path(site), [*history(site), now])


def _write(path: Path, events: Sequence[Event]) -> None:
    trees = [event.model_dump(mode="json") for event in events]
    files.write_private(path, content=json.dumps(trees, indent=1, ensure_ascii=False).encode())
    durable.sync_directory(path.parent)


def _path(site: Site) -> Path:
    return site.private / "withdrawn.json"
