from __future__ import annotations

import io
import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.errors import ConfigError, DeploymentError, UserError
from server import bundle, services, submission
from server.__main__ import main
from server.home import Home, create_home
from server.process import Identity
from server.progress import Progress
from server.run_record import End, RunRecord, open_runs
from server.submission import Followed, Outcome
from tests.plans import plan

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "home", host="127.0.0.1", port=1, internal_port=2)


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


def test_a_coordinator_that_does_not_run_is_the_users_error_and_nothing_is_written(home: Home) -> None:
    with pytest.raises(UserError, match="feverfew-server start"):
        submission.submit(home, "{}", "run-1")
    assert list(home.runs.iterdir()) == []


def submit_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["feverfew-server", "submit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_an_exported_plan_is_what_would_be_sent_and_its_run_is_kept_for_it_and_not_started(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, given, exported = plan(rounds=3), tmp_path / "given.json", tmp_path / "exported.json"
    given.write_text(json.dumps(asked.model_dump(mode="json"), indent=2))
    arguments = (home.directory, given, "--run", "run-7", "--json", "--export", exported)
    assert submit_command(monkeypatch, *arguments) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"run": "run-7", "plan_hash": asked.hash}
    assert f"submit {home.directory} {exported} --run run-7" in told.err
    assert exported.read_text() == asked.to_json() == (home.runs / "run-7" / "plan.json").read_text()
    assert list(open_runs(home.runs)) == [], "nothing is started"
    own = Identity.of(os.getpid())
    assert own is not None
    own.write(home.state / "supervisor.pid")
    with pytest.raises(UserError, match="began with"):
        submission.submit(home, plan(rounds=4).to_json(), "run-7")
    submission.submit(home, exported.read_text(), "run-7")
    assert [record.run for record, _ in open_runs(home.runs)] == ["run-7"]


def test_a_plan_that_is_none_is_not_exported(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.json"
    given.write_text(plan().to_json().replace('"rounds":25', '"rounds":-1'))
    assert submit_command(monkeypatch, home.directory, given, "--export", tmp_path / "exported.json") == 2
    assert not (tmp_path / "exported.json").exists() and list(home.runs.iterdir()) == []


@pytest.fixture
def running(home: Home) -> Home:
    """A home whose supervisor is this process."""
    own = Identity.of(os.getpid())
    assert own is not None
    own.write(services.pid_file(home, "supervisor"))
    return home


def test_a_run_goes_on_with_its_own_plan_only(running: Home) -> None:
    submission.submit(running, "{}", "run-1")
    submission.submit(running, "{}", "run-1")
    with pytest.raises(UserError, match="new id"):
        submission.submit(running, '{"a":1}', "run-1")


def test_a_run_that_goes_on_is_followed_and_one_that_ended_goes_on(running: Home) -> None:
    submission.submit(running, "{}", "run-1")
    record = RunRecord(directory=running.runs / "run-1")
    asked = record.submission
    assert asked is not None
    record.keep(replace(asked, flower_run=7, lives=3))
    submission.submit(running, "{}", "run-1")
    assert record.submission == replace(asked, flower_run=7, lives=3), "it is going on"
    record.finish(End(status="failed", message="why"))
    submission.submit(running, "{}", "run-1")
    assert record.end is None and record.submission == asked


def test_what_was_asked_for_is_open_until_it_ends(running: Home) -> None:
    for run in ("run-2", "run-1"):
        submission.submit(running, "{}", run)
    assert [record.run for record, _ in open_runs(running.runs)] == ["run-1", "run-2"]
    submission.stop(running, "run-1")
    assert [record.run for record, _ in open_runs(running.runs)] == ["run-2"]
    with pytest.raises(UserError, match="going on"):
        submission.stop(running, "run-1")


def test_a_run_that_was_stopped_stays_stopped(running: Home) -> None:
    submission.submit(running, "{}", "run-1")
    submission.stop(running, "run-1")
    record = RunRecord(directory=running.runs / "run-1")
    record.finish(End(status="failed", message="its process was ended in the middle"))
    assert record.end == End(status="stopped", message="stopped by the coordinator")


def _follow(home: Home, *, end: End, offset: int = 0, **files: str) -> tuple[Outcome, list[dict[str, Any]]]:
    record = RunRecord(directory=home.runs / "run-1")
    record.directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (record.directory / name.replace("_", ".")).write_text(text)
    record.finish(end)
    shown: list[dict[str, Any]] = []
    return submission.follow(home, Followed(run="run-1", events_bytes=offset), show=shown.append), shown


def test_a_run_is_a_success_only_if_it_completed_and_the_report_exists(home: Home) -> None:
    completed = End(status="completed", message="")
    without, _ = _follow(home, end=completed)
    assert not without.is_success and "no report" in without.to_text()
    for status in ("failed", "quorum_not_reached"):
        outcome, _ = _follow(home, end=End(status=status, message="why"), report_json="{}")
        assert not outcome.is_success and status in outcome.to_text() and "why" in outcome.to_text()
    outcome, _ = _follow(home, end=completed, report_json="{}")
    assert outcome.is_success and json.loads(outcome.to_json())["success"] is True


def test_every_whole_event_is_shown_once_and_the_past_of_a_run_not_again(home: Home) -> None:
    past, new = '{"event": "past"}\n', '{"event": "new"}\n{"event": "newer"}\n{"event": "half'
    _, shown = _follow(home, end=End(status="failed", message=""), offset=len(past), events_jsonl=past + new)
    assert [event["event"] for event in shown] == ["new", "newer"]


def test_a_follower_gives_up_when_the_coordinator_is_away_and_says_that_the_run_goes_on(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "ABSENCE_SECONDS", 0.1)
    with pytest.raises(DeploymentError, match="goes on"):
        submission.follow(home, Followed(run="run-1", events_bytes=0), show=print)


@pytest.mark.parametrize(
    ("status", "told"), [("failed", "0:00:00 failed"), ("quorum_not_reached", "0:00:00 quorum not reached")]
)
def test_progress_says_once_how_a_run_ended(status: str, told: str) -> None:
    shown = io.StringIO()
    with Progress(num_rounds=2, console=Console(file=shown, width=200)) as progress:
        progress.show({"event": "run_failed", "status": status})
    assert shown.getvalue().rstrip().endswith(told)


def test_progress_tells_what_went_wrong_in_lines_that_stay() -> None:
    shown = io.StringIO()
    with Progress(num_rounds=2, console=Console(file=shown, width=200)) as progress:
        for event in (
            {"event": "site_prepared", "site": "east", "status": "approved", "reason": ""},
            {"event": "site_prepared", "site": "north", "status": "declined", "reason": "budget"},
            {"event": "site_prepared", "site": "west", "status": "waiting", "reason": "not_approved"},
            {"event": "approval_awaited", "sites": ["west"], "seconds": 60.0},
            {"event": "round_started", "round": 1, "sites": 3},
            {"event": "reply_rejected", "round": 1, "site": "south", "code": "not_finite"},
            {"event": "round_finished", "round": 1, "sites_valid": 2, "train_loss": 0.5},
            {"event": "quorum_not_reached", "message": "too few"},
            {"event": "something new"},
        ):
            progress.show(event)
    text = shown.getvalue()
    assert "west has not approved the plan yet" in text
    for part in ("north does not take part: declined budget", "south: not_finite", "2 of 3 sites", "too few"):
        assert part in text
    assert "east" not in text
