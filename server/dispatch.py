"""Starts the runs that were submitted, and starts again those that were lost.

Flower ends a run whose ServerApp died and gives the next one a new id; our id survives. A restarted run goes
on from its last checkpoint, and the sites answer what they did before from what they have stored.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import httpx

from common import logline
from common.flower import refusal_text
from common.trail import Trail
from server import bundle, checkpoint, enrolment, process, trail
from server.control import Control, FlowerRun
from server.home import Home
from server.run_record import EVENTS, PLAN, End, RunRecord, Submission, open_runs

logger = logging.getLogger("feverfew.supervisor")

LOOK_SECONDS: Final = 0.2
ASK_SECONDS: Final = 1.0
"""How often the SuperLink is asked about a run of which no process is known."""
MAX_LIVES: Final = 8
"""A run that was started so often without getting a round further is given up."""
MAX_PAUSE_SECONDS: Final = 30.0


def pause_seconds(lives: int) -> float:
    """Returns how long to wait before a run is started again that had so many lives without getting on.

    >>> [pause_seconds(lives) for lives in (1, 2, 3, 8)]
    [0.0, 1.0, 2.0, 30.0]
    """
    return 0.0 if lives < 2 else min(MAX_PAUSE_SECONDS, 2.0 ** (lives - 2))


@dataclass(kw_only=True)
class Dispatch:
    """Looks after the open runs of a coordinator; in a thread of its own while the supervisor lives."""

    home: Home
    _knows_sites: bool = True
    _due: dict[str, float] = field(default_factory=dict)
    _asked: dict[str, float] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        """Looks again and again until it is told to stop; no failure of the SuperLink ends it."""
        while not stop.wait(LOOK_SECONDS):
            try:
                self.look()
            except httpx.HTTPStatusError as error:
                logger.warning("the SuperLink refuses: %s", refusal_text(error))
            except httpx.HTTPError:
                pass  # it is away, and being started again
            except OSError as error:
                logger.error("runs could not be looked after: %s", error.strerror)
                stop.wait(ASK_SECONDS)

    def look(self) -> None:
        """Starts what was never started, and what was lost."""
        if not self._knows_sites:  # the SuperLink's data base may be a new one
            self._knows_sites = enrolment.settle_now(self.home)
        for record, submission in open_runs(self.home.runs):
            with logline.about(run=record.run):
                self._look_at(record, submission)

    def _look_at(self, record: RunRecord, submission: Submission) -> None:
        if submission.flower_run == 0:
            self._start(record, submission)
        elif self._is_lost(record, submission):
            self._note_loss(record, submission)
        elif time.monotonic() >= self._due.get(record.run, float("inf")):
            self._start(record, submission)

    def restarted(self, name: str) -> None:
        """Tells every open run that a process of the coordinator was started again."""
        if name == "superlink":
            self._knows_sites = False
        trail.record_if_possible(self.home, "restarted", process=name)
        for record, _ in open_runs(self.home.runs):
            _trail(record).record("restarted", process=name)

    def _is_lost(self, record: RunRecord, submission: Submission) -> bool:
        if record.run in self._due:
            return False  # known, and waiting for its time
        life = record.life
        is_carried = life is not None and life.flower_run == submission.flower_run
        if is_carried and life is not None and life.is_over:
            return not record.end
        now = time.monotonic()
        if now - self._asked.get(record.run, 0.0) < ASK_SECONDS:
            return False
        self._asked[record.run] = now
        with self.home.control() as control:
            known = _known(control, submission.flower_run)
        # What is over for Flower may still write its report; what Flower does not know gets no further.
        return not known or (not is_carried and all(run.is_finished for run in known))

    def _note_loss(self, record: RunRecord, submission: Submission) -> None:
        reached = checkpoint.newest_round(record.directory / "checkpoints")
        lives = 0 if reached > submission.server_round else submission.lives
        if lives >= MAX_LIVES:
            _trail(record).record("given_up", lives=lives)
            trail.sign_run(self.home, record.run)
            record.finish(End(status="failed", message=self._why(submission)))
            logger.error("run %s was started %d times in vain and is given up", record.run, lives)
            return
        record.keep(replace(submission, lives=lives, server_round=reached))
        self._due[record.run] = time.monotonic() + pause_seconds(lives)
        logger.warning("run %s was lost after round %d; starting it again", record.run, reached)
        _trail(record).record("restarted", process="serverapp", round=reached)

    def _why(self, submission: Submission) -> str:
        told = f"its process died {MAX_LIVES} times without getting on; see logs/superexec.log"
        with contextlib.suppress(httpx.HTTPError), self.home.control() as control:
            details = [run.details for run in control.runs(submission.flower_run) if run.details]
            return "; ".join([*details, told])
        return told

    def _start(self, record: RunRecord, submission: Submission) -> None:
        with self.home.control() as control:
            former = _unfinished(control, record.run)
            if submission.flower_run == 0 and former:  # a former supervisor died before it noted it
                flower_run = former[-1].run_id
            else:
                self._end_former(record, control, former)
                flower_run = self._submit(control, record, submission)
        if not flower_run:
            record.finish(End(status="failed", message="the SuperLink refuses the bundle"))
            return
        record.keep(replace(submission, flower_run=flower_run, lives=submission.lives + 1))
        self._due.pop(record.run, None)
        logger.info("run %s is Flower's run %d", record.run, flower_run)

    def _end_former(self, record: RunRecord, control: Control, former: list[FlowerRun]) -> None:
        life = record.life
        if life is not None and not life.is_over:
            process.end(life.identity)
        for run in former:
            with contextlib.suppress(httpx.HTTPStatusError):  # it has ended meanwhile
                control.stop(run.run_id)

    def _submit(self, control: Control, record: RunRecord, submission: Submission) -> int:
        config = {"plan": (record.directory / PLAN).read_text(encoding="utf-8"), "run": record.run}
        with tempfile.TemporaryDirectory(dir=self.home.state, prefix="bundle-") as place:
            path = bundle.write_bundle(
                Path(place) / "app", server_app=submission.server_app, client_app=submission.client_app
            )
            return control.start(path, config=config)


def watch(dispatch: Dispatch, stop: threading.Event) -> Callable[[], None]:
    """Starts a thread that looks after the runs; returns what ends it."""
    thread = threading.Thread(target=dispatch.run, args=(stop,), name="dispatch", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(ASK_SECONDS)

    return end


def _known(control: Control, flower_run: int) -> list[FlowerRun]:
    """Returns one of Flower's runs, or nothing: a new data base does not know it."""
    try:
        return control.runs(flower_run)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 404:
            return []
        raise


def _unfinished(control: Control, run: str) -> list[FlowerRun]:
    return [found for found in control.runs() if found.config.get("run") == run and not found.is_finished]


def _trail(record: RunRecord) -> Trail:
    return Trail(record.directory / EVENTS)
