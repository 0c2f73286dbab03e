"""The trails of a coordinator: its own, and one in the directory of each run; signed with a key of their own.

The key signs nothing else. It is not the authority's, which the process that reads what sites send must not
hold, and not the server's, which is renewed: a signature must be provable for as long as the trail is kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import keys, seal
from common.errors import StateError, UserError
from common.seal import Finding, Seal
from common.trail import FILE, Trail, account
from server.home import Home

logger = logging.getLogger("feverfew.trail")

OWN = "coordinator"


def record(home: Home, event: str, **fields: Any) -> None:
    """Appends an event to the coordinator's own trail, with the account that caused it."""
    Trail(home.directory / FILE).record(event, **fields, by=account())


def record_if_possible(home: Home, event: str, **fields: Any) -> None:
    """Appends an event of which a full disk must not end the coordinator."""
    Trail(home.directory / FILE).record_if_possible(event, **fields, by=account())


def record_submission(home: Home, run: str, *, plan_json: str) -> None:
    """Appends who submitted which plan, to the coordinator's own trail and to that of the run."""
    plan_hash = hashlib.sha256(plan_json.encode()).hexdigest()
    record(home, "submitted", run=run, plan_hash=plan_hash)
    sign(home)
    Trail(home.runs / run / FILE).record("submitted", run=run, plan_hash=plan_hash, by=account())


def record_stop(home: Home, run: str) -> None:
    """Appends who stopped a run."""
    record(home, "stopped_run", run=run)
    sign(home)
    Trail(home.runs / run / FILE).record("stopped", run=run, by=account())
    sign_run(home, run)


def sign(home: Home) -> None:
    """Signs the coordinator's own trail."""
    _sign(home.directory / FILE, name=OWN, key=home.trail_key, head=home.directory / "trail.head")


def sign_run(home: Home, run: str) -> None:
    """Signs the trail of a run."""
    _sign(home.runs / run / FILE, name=run_name(run), key=home.trail_key, head=run_head(home.heads, run))


@contextmanager
def signed(path: Path, *, run: str, key: Path, heads: Path) -> Iterator[None]:
    """Signs the trail of a run when it ends, however it does; for the process that carries it."""
    try:
        yield
    finally:
        _sign(path, name=run_name(run), key=key, head=run_head(heads, run))


def verify(home: Home, *, run: str | None) -> list[Finding]:
    """Says of one run's trail whether it is unbroken, or of the coordinator's own and those of all runs.

    Raises:
        UserError: there is no such run.
    """
    runs = sorted(path.name for path in home.runs.iterdir() if path.is_dir())
    if run is not None and run not in runs:
        raise UserError(f"Expected a run of {home.directory}, found none of the id {run!r}.")
    key = keys.own(home.trail_key).public_key()
    of_runs = [
        seal.verify(home.runs / name / FILE, name=run_name(name), key=key, head=run_head(home.heads, name))
        for name in (runs if run is None else [run])
    ]
    if run is not None:
        return of_runs
    own = seal.verify(home.directory / FILE, name=OWN, key=key, head=home.directory / "trail.head")
    return [own, *of_runs]


def fingerprint(home: Home) -> str:
    """Returns the short form of the key that signs trails and packs, for a telephone."""
    return keys.fingerprint(keys.own(home.trail_key).public_key())


def run_name(run: str) -> str:
    """Returns the name under which a run's trail is signed."""
    return f"run {run}"


def run_head(heads: Path, run: str) -> Path:
    """Returns the file that remembers the last signed line of a run's trail."""
    return heads / f"{run}.trail"


def _sign(path: Path, *, name: str, key: Path, head: Path) -> None:
    """A broken trail is left unsigned and said in the log: it must not end what it only tells of."""
    try:
        head.parent.mkdir(parents=True, exist_ok=True)
        seal.sign(path, Seal(name=name, key_file=key, head=head))
    except (StateError, UserError) as error:
        logger.error("%s", error)
    except OSError as error:
        logger.error("the trail %s could not be signed: %s", path, error.strerror)
