"""Runs that were asked for are started, started again when they are lost, and given up at last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from common import trail
from server import dispatch as dispatching
from server import services, submission
from server.control import FlowerRun
from server.dispatch import Dispatch
from server.home import Home, create_home
from server.process import Identity
from server.run_record import EVENTS, End, Life, RunRecord


@dataclass
class ScriptedControl:
    """A SuperLink in memory: gives ids to runs, and ends them when it is told to."""

    runs_by_id: dict[int, FlowerRun] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    is_away: bool = False

    def __enter__(self) -> ScriptedControl:
        if self.is_away:
            raise httpx.ConnectError("away")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, bundle: Path, *, config: dict[str, str]) -> int:
        number = len(self.runs_by_id) + 1
        self.runs_by_id[number] = FlowerRun(run_id=number, status="running", details="", config=config)
        return number

    def runs(self, run_id: int | None = None) -> list[FlowerRun]:
        return [run for number, run in self.runs_by_id.items() if run_id in (None, number)]

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)
        self.end(run_id, "finished:stopped")

    def end(self, run_id: int, status: str) -> None:
        former = self.runs_by_id[run_id]
        self.runs_by_id[run_id] = FlowerRun(run_id=run_id, status=status, details="why", config=former.config)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> ScriptedControl:
    control = ScriptedControl()
    monkeypatch.setattr(Home, "control", lambda self: control)
    monkeypatch.setattr(dispatching, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(dispatching, "pause_seconds", lambda lives: 0.0)
    return control


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    home = create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)
    own = Identity.of(os.getpid())
    assert own is not None
    own.write(services.pid_file(home, "supervisor"))
    submission.submit(home, "{}", "run-1")
    return RunRecord(directory=home.runs / "run-1")


@pytest.fixture
def dispatch(record: RunRecord) -> Dispatch:
    settings: Any = None
    return Dispatch(home=Home(directory=record.directory.parents[1], settings=settings))


def flower_run(record: RunRecord) -> int:
    found = record.submission
    assert found is not None
    return found.flower_run


def lose(record: RunRecord) -> None:
    """A process takes the run, and dies."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = Identity.of(child.pid)
    assert identity is not None
    life = Life(flower_run=flower_run(record), pid=identity.pid, started=identity.started)
    child.kill()
    child.wait()
    (record.directory / "life.json").write_text(
        f'{{"flower_run": {life.flower_run}, "pid": {life.pid}, "started": {life.started}}}'
    )


def save_round(record: RunRecord, number: int) -> None:
    (record.directory / "checkpoints" / f"{number:06d}").mkdir(parents=True)


def test_what_was_asked_for_is_started_once(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    dispatch.look()
    assert list(control.runs_by_id) == [1] and flower_run(record) == 1
    assert control.runs_by_id[1].config == {"plan": "{}", "run": "run-1"}


def test_a_run_whose_process_died_is_started_again_and_its_trail_says_so(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    lose(record)
    dispatch.look()
    dispatch.look()
    assert flower_run(record) == 2 and control.stopped == [1], "Flower's old run is ended first"
    (event,) = [e for e in trail.read(record.directory / EVENTS) if e["event"] != "submitted"]
    assert event["event"] == "restarted" and event["process"] == "serverapp"


def test_a_run_that_flower_ended_before_a_process_took_it_is_started_again(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    control.end(1, "finished:failed")
    dispatch.look()
    dispatch.look()
    assert flower_run(record) == 2


def test_a_living_process_is_left_alone(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    record.begin_life(1)
    for _ in range(3):
        dispatch.look()
    assert list(control.runs_by_id) == [1]


def test_a_process_whose_run_a_new_data_base_does_not_know_is_replaced(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as carrier:
        identity = Identity.of(carrier.pid)
        assert identity is not None
        life = Life(flower_run=1, pid=identity.pid, started=identity.started)
        (record.directory / "life.json").write_text(json.dumps(asdict(life)))
        dispatch.look()
        assert carrier.poll() is None, "the SuperLink knows its run"
        control.runs_by_id = {9: FlowerRun(run_id=9, status="finished", details="", config={})}
        dispatch.look()
        dispatch.look()
    assert carrier.returncode == -signal.SIGKILL and flower_run(record) == 2
    assert control.runs_by_id[2].config["run"] == record.run


def test_a_run_that_ended_is_not_started_again(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    dispatch.look()
    lose(record)
    record.finish(End(status="quorum_not_reached", message="too few"))
    dispatch.look()
    dispatch.look()
    assert list(control.runs_by_id) == [1]


def test_a_run_that_never_gets_on_is_given_up_and_one_that_does_is_not(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    for number in range(1, 2 * dispatching.MAX_LIVES):
        dispatch.look()
        lose(record)
        save_round(record, number)
        dispatch.look()
    assert record.end is None
    for _ in range(dispatching.MAX_LIVES + 1):
        dispatch.look()
        lose(record)
        dispatch.look()
    end = record.end
    assert end is not None and end.status == "failed" and "without getting on" in end.message


def test_a_start_that_was_not_noted_is_found_again(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    control.start(record.directory, config={"plan": "{}", "run": "run-1"})
    dispatch.look()
    assert list(control.runs_by_id) == [1] and flower_run(record) == 1


def test_a_superlink_that_is_away_ends_nothing(
    dispatch: Dispatch, record: RunRecord, control: ScriptedControl
) -> None:
    control.is_away = True
    stop = threading.Event()
    end = dispatching.watch(dispatch, stop)
    assert not stop.wait(0.5)
    control.is_away = False
    assert not stop.wait(0.5)
    end()
    assert flower_run(record) == 1


def test_pauses_grow_to_half_a_minute() -> None:
    pauses = [dispatching.pause_seconds(lives) for lives in range(12)]
    assert pauses == sorted(pauses) and pauses[1] == 0 and pauses[-1] == dispatching.MAX_PAUSE_SECONDS
