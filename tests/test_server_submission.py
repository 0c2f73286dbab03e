from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.errors import ConfigError, UserError
from server import bundle, submission, supervisor
from server.control import FlowerRun
from server.home import Home, create_home
from server.progress import Progress
from server.submission import EVENTS, Outcome, Submission
from server.supervisor import Identity

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


class ScriptedControl:
    """A SuperLink in memory whose run takes on one state after the other."""

    def __init__(self, states: list[str]) -> None:
        self._states = states

    def __enter__(self) -> ScriptedControl:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def runs(self, run_id: int) -> list[FlowerRun]:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return [FlowerRun(run_id=run_id, status=state, details="why", config={})]


def test_the_bundle_names_the_apps_and_holds_no_code(tmp_path: Path) -> None:
    directory = bundle.write_bundle(tmp_path / "app")
    assert sorted(path.name for path in directory.iterdir()) == ["LICENSE", "pyproject.toml"]
    settings = tomllib.loads((directory / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert settings["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert set(settings["config"]) == {"plan", "run"}


@pytest.mark.parametrize("run", ["", "Run", "a/b", "..", "a" * 65, "a b", "a\n"])
def test_a_run_id_that_is_no_name_is_refused_before_anything_is_written(home: Home, run: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        submission.submit(home, "{}", run)
    assert list(home.runs.iterdir()) == []


def test_new_run_ids_are_valid_and_differ() -> None:
    ids = {submission.new_run_id() for _ in range(20)}
    assert len(ids) > 1 and all(submission.RUN_ID.fullmatch(run) for run in ids)


def test_a_coordinator_that_does_not_run_is_the_users_error(home: Home) -> None:
    with pytest.raises(UserError, match="feverfew-server start"):
        submission.submit(home, "{}", "run-1")
    assert not list(home.state.glob("bundle-*"))


def test_a_run_goes_on_with_its_own_plan_only(home: Home) -> None:
    for plan, error in (
        ("{}", "feverfew-server start"),
        ("{}", "feverfew-server start"),
        ('{"a":1}', "new id"),
    ):
        with pytest.raises(UserError, match=error):
            submission.submit(home, plan, "run-1")


def _follow(home: Home, monkeypatch: pytest.MonkeyPatch, *, states: list[str], **files: str) -> Any:
    monkeypatch.setattr(submission, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(submission, "STATUS_SECONDS", 0.01)
    monkeypatch.setattr(Home, "control", lambda self: ScriptedControl(states))
    directory = home.runs / "run-1"
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    shown: list[dict[str, Any]] = []
    offset = int(files.get("offset", 0))
    submitted = Submission(run="run-1", flower_run=7, events_bytes=offset)
    return submission.follow(home, submitted, show=shown.append), shown


def test_a_run_is_a_success_only_if_flower_says_so_and_the_report_exists(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ["pending", "running", "finished:completed"]
    without, _ = _follow(home, monkeypatch, states=states)
    assert not without.is_success and "no report" not in without.status
    for state in ("finished:failed", "finished:stopped"):
        outcome, _ = _follow(home, monkeypatch, states=[state], report_json="{}")
        assert not outcome.is_success and state in outcome.to_text()
    outcome, _ = _follow(home, monkeypatch, states=["finished:completed"], report_json="{}")
    assert outcome.is_success and json.loads(outcome.to_json())["success"] is True


def test_every_whole_event_is_shown_once_and_the_past_of_a_run_not_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    past, new = '{"event": "past"}\n', '{"event": "new"}\n{"event": "newer"}\n{"event": "half'
    (home.runs / "run-1").mkdir()
    (home.runs / "run-1" / EVENTS).write_text(past + new)
    _, shown = _follow(home, monkeypatch, states=["running", "finished:failed"], offset=str(len(past)))
    assert [event["event"] for event in shown] == ["new", "newer"]


def test_an_outcome_tells_where_the_files_are_and_why_there_is_no_success() -> None:
    outcome = Outcome(
        run="r", flower_run=1, status="finished:failed", details="why", directory="/d", has_report=False
    )
    assert all(part in outcome.to_text() for part in ("r", "finished:failed", "why", "/d"))


def test_progress_tells_what_went_wrong_in_lines_that_stay() -> None:
    shown = io.StringIO()
    with Progress(num_rounds=2, console=Console(file=shown, width=200)) as progress:
        for event in (
            {"event": "site_prepared", "site": "east", "status": "approved", "reason": ""},
            {"event": "site_prepared", "site": "north", "status": "declined", "reason": "budget"},
            {"event": "round_started", "round": 1, "sites": 3},
            {"event": "reply_rejected", "round": 1, "site": "south", "code": "not_finite"},
            {"event": "round_finished", "round": 1, "sites_valid": 2, "train_loss": 0.5},
            {"event": "quorum_not_reached", "message": "too few"},
            {"event": "something new"},
        ):
            progress.show(event)
    text = shown.getvalue()
    for part in ("north does not take part: declined budget", "south: not_finite", "2 of 3 sites", "too few"):
        assert part in text
    assert "east" not in text


def test_a_process_is_known_by_its_id_and_its_start(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = Identity.of(process.pid)
    assert identity is not None
    identity.write(path)
    assert Identity.read(path) == identity
    other = Identity(pid=process.pid, started=identity.started - 1)
    other.write(path)
    assert Identity.read(path) is None, "the id was used again by another process"
    identity.write(path)
    process.kill()
    process.wait()
    assert Identity.read(path) is None
    path.write_text("noise")
    assert Identity.read(path) is None


def test_a_process_of_somebody_else_is_never_ended(home: Home) -> None:
    own = Identity.of(os.getpid())
    assert own is not None
    Identity(pid=own.pid, started=own.started - 1).write(supervisor.pid_file(home, "gateway"))
    supervisor.end_leftover(home, "gateway")
    assert not supervisor.pid_file(home, "gateway").exists()


def test_a_leftover_that_does_not_heed_sigterm_is_killed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.3)
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn = f"import signal, time; {ignoring}; print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    identity = Identity.of(process.pid)
    assert identity is not None
    identity.write(supervisor.pid_file(home, "gateway"))
    supervisor.end_leftover(home, "gateway")
    assert process.wait(5) == -9
    process.stdout.close()


def test_the_superlink_is_started_so_that_it_serves_nobody_but_us(home: Home) -> None:
    (command,) = (service.command for service in supervisor.services(home) if service.name == "superlink")
    for option, value in (("--host", "127.0.0.1"), ("--isolation", "process")):
        assert command[command.index(option) + 1] == value
    for option in ("--enable-supernode-auth", "--disable-runtime-dependency-installation", "--ssl-keyfile"):
        assert option in command
    environment = supervisor.environment(home)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment[supervisor.RUN_DIRECTORY].replace("{run}", "r") == str(home.runs / "r")
    assert environment[supervisor.HEADS_DIRECTORY] == str(home.heads)
