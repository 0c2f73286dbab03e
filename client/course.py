"""The course of each run at this site: which plan it is, and which tasks it has asked for, in which order.

A server that restarts may ask again for what it has not got or has lost; it may not go back to a round that
was never asked, evaluate when the plan does not, or carry another plan under the name of a run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from client.files import private_directory
from client.site import Site
from common import durable
from common.errors import Refusal, StateError
from common.exchange import Task
from common.plan import NoPrivacy, Plan
from common.schema import Tables

SECONDS_TO_LOCK: Final = 60
EXACT: Final = "exact_course.sqlite"
PHASES: Final = {
    ("train", ""): 0,
    ("landmarks", ""): 0,
    ("evaluate", "validation"): 1,
    ("evaluate", "test"): 2,
    ("deliver", ""): 3,
}
"""The order of tasks within a round, by purpose and part. A plan is about training or about landmarks."""
_TABLES = Tables(
    what="the tasks of runs in",
    create="""
    CREATE TABLE IF NOT EXISTS asked (
        run TEXT NOT NULL, plan_hash TEXT NOT NULL, server_round INTEGER NOT NULL, phase INTEGER NOT NULL,
        task TEXT PRIMARY KEY);
    CREATE INDEX IF NOT EXISTS asked_by_run ON asked (run, server_round, phase)
    """,
    unmarked={frozenset(("asked",)): 1},
)


def require_plan(site: Site, plan: Plan, *, run: str) -> None:
    """Checks that a run has not come with another plan before, and makes the file that notes its tasks.

    Raises:
        Refusal: code ``other_plan``.
    """
    private_directory(site.state)
    own, other = _own_and_other(site, plan)
    _require_plan_in(other, plan, run=run)
    with _opened(own) as database:
        _require_plan(database, plan, run=run)


def _require_plan_in(path: Path, plan: Plan, *, run: str) -> None:
    if path.exists():
        with _opened(path) as database:
            _require_plan(database, plan, run=run)


def rounds_of(plan: Plan, *, purpose: str, part: str) -> Sequence[int]:
    """Returns the rounds in which a plan has a task; it is tested and delivered after the last one only."""
    match purpose, part:
        case "train", "":
            return range(1, plan.rounds + 1)
        case "landmarks", "":
            return range(1, plan.rounds + 1) if plan.landmarks is not None else ()
        case "evaluate", "validation":
            return plan.validation_rounds
        case "evaluate", "test":
            return (plan.rounds,) if plan.evaluation.test_at_end else ()
        case "deliver", "":
            return (plan.rounds,)
    return ()


def enter(site: Site, plan: Plan, task: Task) -> None:
    """Notes a task, with privacy durably, unless its run may not ask for it now; the same may be asked again.

    Raises:
        Refusal: code ``other_plan``; ``wrong_round``: the plan has no such task in that round, or the run has
            gone further without it; ``too_many_repeats``: it came with too many different parameters.
    """
    if task.server_round not in rounds_of(plan, purpose=task.purpose, part=task.part):
        what = f"{task.purpose} {task.part}".strip()
        raise Refusal("wrong_round", f"the plan has no {what} in round {task.server_round}")
    phase = PHASES[task.purpose, task.part]
    place = (task.run, task.server_round, phase)
    private_directory(site.state)
    own, other = _own_and_other(site, plan)
    _require_plan_in(other, plan, run=task.run)
    with _opened(own) as database, database:
        database.execute("BEGIN IMMEDIATE")
        _require_plan(database, plan, run=task.run)
        if _has(database, "task = ?", task.identity):
            return
        same = "run = ? AND server_round = ? AND phase = ?"
        (times,) = database.execute(f"SELECT COUNT(*) FROM asked WHERE {same}", place).fetchone()
        if times > site.settings.max_repeats:
            raise Refusal("too_many_repeats")
        if times == 0 and _has(database, "run = ? AND (server_round, phase) > (?, ?)", *place):
            raise Refusal("wrong_round", "the run has gone further, and never asked for this")
        row = (task.run, plan.hash, task.server_round, phase, task.identity)
        database.execute("INSERT INTO asked VALUES (?, ?, ?, ?, ?)", row)


def _require_plan(database: sqlite3.Connection, plan: Plan, *, run: str) -> None:
    if _has(database, "run = ? AND plan_hash <> ?", run, plan.hash):
        raise Refusal("other_plan", "the run came with another plan before")


def _has(database: sqlite3.Connection, condition: str, *values: object) -> bool:
    return database.execute(f"SELECT 1 FROM asked WHERE {condition} LIMIT 1", values).fetchone() is not None


def _own_and_other(site: Site, plan: Plan) -> tuple[Path, Path]:
    private, exact = _paths(site)
    return (exact, private) if isinstance(plan.privacy, NoPrivacy) else (private, exact)


def _paths(site: Site) -> tuple[Path, Path]:
    """Returns the files of plans with and without privacy.

    Who goes back in a run without privacy learns nothing that was not open to them anyway: the second file
    does not wait for the disk, and can be lost with it; so it must not be the first.
    """
    return site.state / "course.sqlite", site.state / EXACT


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    is_exact = path.name == EXACT
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=SECONDS_TO_LOCK)) as database:
            database.execute(f"PRAGMA synchronous={'OFF' if is_exact else durable.synchronous()}")
            if is_exact:
                database.execute("PRAGMA journal_mode=MEMORY")
            _TABLES.prepare(database, path=path)
            yield database
    except sqlite3.OperationalError:  # a full disk, not a damaged file
        raise
    except sqlite3.DatabaseError as error:
        if is_exact:  # the power failed; it begins anew with the next task
            path.unlink(missing_ok=True)
        raise StateError(
            f"Expected the tasks of runs in {path}, found: {error}; move the file away."
        ) from None
