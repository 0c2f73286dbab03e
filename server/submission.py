"""Asks the running coordinator for a run, and follows it to an honest end.

Asking is a file in the run's directory. The supervisor starts what it finds there
(``server/dispatch.py``), so a run that was asked for is never lost, whatever is killed when.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from common import durable
from common.errors import ConfigError, DeploymentError, UserError
from common.trail import parse
from server import bundle, trail
from server.home import Home
from server.process import Identity
from server.run_record import EVENTS, PLAN, End, RunRecord, Submission

RUN_ID: Final = re.compile(r"[a-z0-9-]{1,64}")
REPORT: Final = "report.json"
LOOK_SECONDS: Final = 0.2
ABSENCE_SECONDS: Final = 120.0
"""A coordinator that is away for longer is not waited for; the run goes on when it is started again."""

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A run that was asked for, and how long its events file was before."""

    run: str
    events_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, why if it did not complete, and whether the report was written."""

    run: str
    status: str
    details: str
    directory: str
    has_report: bool

    @property
    def is_success(self) -> bool:
        return self.status == "completed" and self.has_report

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"success": self.is_success})

    def to_text(self) -> str:
        """Returns one line: the outcome, why if it failed, and where the files are."""
        if self.is_success:
            return f"run {self.run} finished; see {self.directory}"
        why = self.details or ("" if self.has_report else "it left no report")
        return f"run {self.run} did not finish ({self.status}): {why}; see {self.directory}"


def new_run_id() -> str:
    """Returns an id of ours for a run: the time, and enough chance for two in one second."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


def submit(
    home: Home,
    plan_json: str,
    run_id: str,
    *,
    server_app: str = bundle.SERVER_APP,
    client_app: str = bundle.CLIENT_APP,
) -> Followed:
    """Asks for a run of a plan under our id.

    The same id again, with the same plan, follows a run that is going on, and lets one that ended go on from
    its last checkpoint.

    Raises:
        ConfigError: the run id has other characters than a-z, 0-9 and '-'.
        UserError: the coordinator is not running, or the id belongs to another plan.
    """
    _check_id(run_id)
    if not is_running(home):
        raise UserError("Expected a running coordinator, found none; run: feverfew-server start")
    record = reserve(home, plan_json, run_id)
    asked = Submission(run=run_id, submitted=time.time(), server_app=server_app, client_app=client_app)
    former = record.submission
    is_new = former is None or record.end is not None
    if is_new:
        trail.record_submission(home, run_id, plan_json=plan_json)
    events = record.directory / EVENTS
    events_bytes = events.stat().st_size if events.exists() else 0
    if is_new:
        record.keep(asked if former is None else replace(former, flower_run=0, lives=0))
        record.reopen()
    return Followed(run=run_id, events_bytes=events_bytes)


def reserve(home: Home, plan_json: str, run_id: str) -> RunRecord:
    """Binds our id of a run to a plan, for ever, and starts nothing.

    Raises:
        ConfigError: the run id has other characters than a-z, 0-9 and '-'.
        UserError: the id belongs to another plan.
    """
    _check_id(run_id)
    record = RunRecord(directory=home.runs / run_id)
    record.directory.mkdir(mode=0o700, exist_ok=True)
    _keep_plan(record.directory / PLAN, plan_json)
    return record


def stop(home: Home, run_id: str) -> None:
    """Ends a run for good; its last good model stays.

    Raises:
        UserError: there is no such run, or it has ended.
    """
    record = RunRecord(directory=home.runs / run_id)
    submission = record.submission if RUN_ID.fullmatch(run_id) else None
    if submission is None or record.end is not None:
        raise UserError(f"Expected a run that is going on, found none of the id {run_id!r}.")
    trail.record_stop(home, run_id)
    record.finish(End(status="stopped", message="stopped by the coordinator"))
    if submission.flower_run and is_running(home):
        with home.control() as control:
            control.stop(submission.flower_run)


def is_running(home: Home) -> bool:
    """Says whether a supervisor runs for this coordinator."""
    return Identity.read(home.state / "supervisor.pid") is not None


def follow(home: Home, followed: Followed, *, show: Callable[[Event], None]) -> Outcome:
    """Hands every new event of a run to ``show`` as it happens; returns how the run ended.

    Raises:
        DeploymentError: the coordinator was away for too long.
    """
    record = RunRecord(directory=home.runs / followed.run)
    events = _new_events(record.directory / EVENTS, offset=followed.events_bytes)
    seen = time.monotonic()
    while True:
        end = record.end  # before the events: none is written after it
        for event in next(events):
            show(event)
        if end is not None:
            return _outcome(record, end)
        if is_running(home):
            seen = time.monotonic()
        elif time.monotonic() - seen > ABSENCE_SECONDS:
            raise DeploymentError(
                f"Expected a running coordinator, found none for two minutes; run {followed.run} goes on "
                "when it is started again."
            )
        time.sleep(LOOK_SECONDS)


def _outcome(record: RunRecord, end: End) -> Outcome:
    return Outcome(
        run=record.run,
        status=end.status,
        details=end.message,
        directory=str(record.directory),
        has_report=(record.directory / REPORT).is_file(),
    )


def _check_id(run_id: str) -> None:
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"Expected a run id of a-z, 0-9 and '-' (64 at most), found {run_id!r}.")


def _keep_plan(path: Path, plan_json: str) -> None:
    if not path.exists():
        durable.write(path, plan_json.encode())
    elif path.read_text(encoding="utf-8") != plan_json:
        raise UserError(
            f"Expected the plan that run {path.parent.name} began with, found another; choose a new id."
        )


def _new_events(path: Path, *, offset: int) -> Iterator[list[Event]]:
    """Yields, each time, the events that were written since the last time; a half-written line waits."""
    while True:
        events = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    if (event := parse(line)) is not None:
                        events.append(event)
        yield events
