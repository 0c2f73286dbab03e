"""What the coordinator keeps of a run beside its results: who asked for it, what carries it, how it ended.

A run is *open* from its submission until ``end.json`` is there. Whatever dies in between, the supervisor
finds it open and starts it again, under the same id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

from common import durable
from server.process import Identity

PLAN: Final = "plan.json"
EVENTS: Final = "events.jsonl"
SUBMISSION, LIFE, END = "submission.json", "life.json", "end.json"

Note = TypeVar("Note", "Submission", "Life", "End")
Status = Literal["completed", "quorum_not_reached", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that was asked for.

    Attributes:
        run: our id of it.
        submitted: when, seconds since 1970.
        server_app: object reference of what carries it; ``client_app`` likewise at the sites.
        flower_run: Flower's id of its newest life; 0 before the first.
        lives: how often it was started since it last got on.
        server_round: where it was when it was started last.
    """

    run: str
    submitted: float
    server_app: str
    client_app: str
    flower_run: int = 0
    lives: int = 0
    server_round: int = 0


@dataclass(frozen=True, kw_only=True)
class Life:
    """The process that carries a run, as one of Flower's runs."""

    flower_run: int
    pid: int
    started: int

    @property
    def identity(self) -> Identity:
        return Identity(pid=self.pid, started=self.started)

    @property
    def is_over(self) -> bool:
        return Identity.of(self.pid) != self.identity


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended; ``message`` says why where it did not complete."""

    status: Status
    message: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record in a run's directory."""

    directory: Path

    @property
    def run(self) -> str:
        return self.directory.name

    @property
    def submission(self) -> Submission | None:
        return _read(self.directory / SUBMISSION, Submission)

    @property
    def life(self) -> Life | None:
        return _read(self.directory / LIFE, Life)

    @property
    def end(self) -> End | None:
        return _read(self.directory / END, End)

    @property
    def is_stopped(self) -> bool:
        return self.end is not None and self.end.status == "stopped"

    def keep(self, submission: Submission) -> None:
        """Notes what is asked for."""
        _write(self.directory / SUBMISSION, submission)

    def begin_life(self, flower_run: int) -> None:
        """Notes this process as the one that carries the run."""
        identity = Identity.of(os.getpid())
        assert identity is not None
        _write(self.directory / LIFE, Life(flower_run=flower_run, pid=identity.pid, started=identity.started))

    def finish(self, end: End) -> None:
        """Notes how the run ended; one that a person stopped stays stopped."""
        if not self.is_stopped:
            _write(self.directory / END, end)

    def reopen(self) -> None:
        """Lets a run that ended go on."""
        (self.directory / END).unlink(missing_ok=True)


def open_runs(runs: Path) -> Iterator[tuple[RunRecord, Submission]]:
    """Yields the runs that were submitted and have not ended, the oldest first."""
    for path in sorted(runs.glob(f"*/{SUBMISSION}")):
        record = RunRecord(directory=path.parent)
        if not (record.directory / END).exists() and (submission := record.submission) is not None:
            yield record, submission


def _read(path: Path, kind: type[Note]) -> Note | None:
    """Returns a note; None where there is none, or something else in its place."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, note: Note) -> None:
    durable.write(path, json.dumps(asdict(note)).encode())
