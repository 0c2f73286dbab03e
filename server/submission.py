"""Submits a plan to the running coordinator and follows the run to an honest end."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from common.errors import ConfigError, DeploymentError, UserError
from common.flower import refusal_text
from server import bundle
from server.control import Control, FlowerRun
from server.home import Home

RUN_ID: Final = re.compile(r"[a-z0-9-]{1,64}")
NOTE: Final = "submission.json"
EVENTS: Final = "events.jsonl"
REPORT: Final = "report.json"
LOOK_SECONDS: Final = 0.2
STATUS_SECONDS: Final = 1.0
OUTAGE_SECONDS: Final = 120.0
"""A SuperLink that is away for longer ends its runs itself."""

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that was submitted: our id, Flower's, and how long its events file was before."""

    run: str
    flower_run: int
    events_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: Flower's word for it, and whether the report was written."""

    run: str
    flower_run: int
    status: str
    details: str
    directory: str
    has_report: bool

    @property
    def is_success(self) -> bool:
        return self.status == "finished:completed" and self.has_report

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
) -> Submission:
    """Submits a plan under our id.

    The same id again, with the same plan, goes on from the run's last checkpoint.

    Raises:
        ConfigError: the run id has other characters than a-z, 0-9 and '-'.
        UserError: the coordinator is not running, or the id belongs to another plan.
        DeploymentError: the SuperLink refuses the run.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"Expected a run id of a-z, 0-9 and '-' (64 at most), found {run_id!r}.")
    directory = home.runs / run_id
    directory.mkdir(mode=0o700, exist_ok=True)
    _keep_plan(directory / "plan.json", plan_json)
    events = directory / EVENTS
    events_bytes = events.stat().st_size if events.exists() else 0
    config = {"plan": plan_json, "run": run_id}
    with tempfile.TemporaryDirectory(dir=home.state, prefix="bundle-") as place, home.control() as control:
        path = bundle.write_bundle(Path(place) / "app", server_app=server_app, client_app=client_app)
        flower_run = _start(control, path, config)
    note = directory / f"{NOTE}.new"
    note.write_text(json.dumps({"run": run_id, "flower_run": flower_run, "submitted": time.time()}))
    os.replace(note, directory / NOTE)
    return Submission(run=run_id, flower_run=flower_run, events_bytes=events_bytes)


def _keep_plan(path: Path, plan_json: str) -> None:
    if not path.exists():
        path.write_text(plan_json, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != plan_json:
        raise UserError(
            f"Expected the plan that run {path.parent.name} began with, found another; choose a new id."
        )


def _start(control: Control, path: Path, config: dict[str, str]) -> int:
    try:
        flower_run = control.start(path, config=config)
    except httpx.ConnectError:
        raise UserError("Expected a running coordinator, found none; run: feverfew-server start") from None
    except httpx.HTTPStatusError as error:
        raise DeploymentError(f"Expected the run to start, found: {refusal_text(error)}.") from None
    if not flower_run:
        raise DeploymentError("Expected the run to start, found that the SuperLink refuses the bundle.")
    return flower_run


def follow(home: Home, submission: Submission, *, show: Callable[[Event], None]) -> Outcome:
    """Hands every new event of a run to ``show`` as it happens; returns how the run ended.

    Raises:
        DeploymentError: the SuperLink was away for too long.
    """
    directory = home.runs / submission.run
    events = _new_events(directory / EVENTS, offset=submission.events_bytes)
    with home.control() as control:
        for state in _states(control, submission.flower_run):
            for event in next(events):
                show(event)
            if state is not None and state.is_finished:
                for event in next(events):  # those between the last look and the end
                    show(event)
                return _outcome(state, run_id=submission.run, directory=directory)
    raise AssertionError("unreachable: _states does not end")


def _outcome(state: FlowerRun, *, run_id: str, directory: Path) -> Outcome:
    return Outcome(
        run=run_id,
        flower_run=state.run_id,
        status=state.status,
        details=state.details,
        directory=str(directory),
        has_report=(directory / REPORT).is_file(),
    )


def _states(control: Control, flower_run: int) -> Iterator[FlowerRun | None]:
    """Yields the state of a run for ever, None when it was not asked for just now."""
    asked = answered = time.monotonic()
    yield None
    while True:
        time.sleep(LOOK_SECONDS)
        now = time.monotonic()
        if now - asked < STATUS_SECONDS:
            yield None
            continue
        asked = now
        try:
            found = control.runs(flower_run)
        except httpx.HTTPError:
            if now - answered > OUTAGE_SECONDS:
                raise DeploymentError(
                    "Expected the SuperLink to answer, found none for two minutes."
                ) from None
            yield None
        else:
            answered = now
            yield found[0]


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
                    events.append(json.loads(line))
        yield events
