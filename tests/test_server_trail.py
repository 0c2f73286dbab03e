from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from common import certificates, keys
from common.errors import QuorumNotReached, SchemaError
from common.plan import Plan
from common.trail import Trail, account, read
from server import __main__ as command
from server import app, enrolment, services, submission, trail
from server.home import Home, create_home
from server.process import Identity
from server.run_record import RunRecord
from tests.grid import Behaviour, InlineGrid
from tests.rounds import dies, site, tiny_plan

RUN = "run-1"
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def make_home(directory: Path) -> Home:
    """A home whose supervisor is this process."""
    home = create_home(directory, host="127.0.0.1", port=1, internal_port=2)
    own = Identity.of(os.getpid())
    assert own is not None
    own.write(home.state / "supervisor.pid")
    return home


def carry(home: Home, plan: Plan, nodes: dict[str, Behaviour], *, run: str = RUN) -> None:
    """Submits a plan and carries the run as its ServerApp does."""
    carry_text(home, plan.to_json(), nodes, run=run)


def carry_text(home: Home, plan: str, nodes: dict[str, Behaviour], *, run: str) -> None:
    submission.submit(home, plan, run)
    with pytest.MonkeyPatch.context() as patch:
        for name in (services.RUN_DIRECTORY, services.HEADS_DIRECTORY, services.TRAIL_KEY):
            patch.setenv(name, services.environment(home, log_format="text")[name])
        config = {"plan": plan, "run": run}
        state = RecordDict()
        context = Context(run_id=1, node_id=1, node_config={}, state=state, run_config=config)
        app.main(InlineGrid(nodes), context)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@pytest.fixture
def done(home: Home) -> Home:
    """A home with a run of two rounds in which one of three sites declined."""
    plan = tiny_plan(sites=3)
    nodes = {name: site(plan, name, 0.5) for name in ("north", "south")}
    nodes["west"] = site(plan, "west", 0.5, status="declined", reason="budget_exceeded")
    carry(home, plan, nodes)
    return home


def events(home: Home, run: str | None = RUN) -> list[dict[str, Any]]:
    directory = home.directory if run is None else home.runs / run
    return list(read(directory / "events.jsonl"))


def test_a_run_of_a_former_schema_ends_at_once_and_says_why(home: Home) -> None:
    """After an update of the coordinator: it is not started eight times in vain."""
    former = json.dumps({"schema_version": 1, "study": "chest"})
    with pytest.raises(SchemaError):
        carry_text(home, former, {}, run="former")
    end = RunRecord(directory=home.runs / "former").end
    assert end is not None and end.status == "failed"
    assert "a plan of schema 3, found 1: an older Feverfew made it" in end.message


def test_a_run_is_signed_when_it_ends_and_before_it_is_called_ended(done: Home) -> None:
    told = events(done)
    assert [event["event"] for event in told[:2]] == ["submitted", "run_started"]
    assert [event["event"] for event in told[-2:]] == ["run_finished", "signed"]
    assert RunRecord(directory=done.runs / RUN).end is not None
    assert {event["site"] for event in told if event["event"] == "reply"} == {"north", "south"}
    asked = [event["asked"] for event in told if event["event"] == "round_started"]
    assert asked == [["north", "south"]] * 2
    (found,) = trail.verify(done, run=RUN)
    assert found.is_unbroken and found.signed_to == len(told)


def test_a_run_without_a_quorum_is_signed_too(home: Home) -> None:
    plan = tiny_plan(sites=2)
    with pytest.raises(QuorumNotReached):
        carry(home, plan, {"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5, edit=dies)})
    assert [event["event"] for event in events(home)][-2:] == ["run_failed", "signed"]
    assert trail.verify(home, run=RUN)[0].signed_to == len(events(home))


def test_what_was_there_before_a_run_is_not_looked_at_for_garbage(home: Home) -> None:
    """Flower's Bulyan collects garbage for every update: a tenth of a second each, with what is imported."""
    before: list[list[str]] = [[]]
    plan = tiny_plan(sites=1, quorum=1)
    carry(home, plan, {"a": site(plan, "a", 0.5)})
    assert not any(one is before for one in gc.get_objects())


def test_the_coordinator_records_who_submitted_and_stopped_what(home: Home) -> None:
    plan = tiny_plan()
    submission.submit(home, plan.to_json(), RUN)
    submission.submit(home, plan.to_json(), RUN)  # asked for already, so followed only
    submission.stop(home, RUN)
    own, of_run = events(home, None), events(home)
    assert [event["event"] for event in own if event["event"] != "signed"] == ["submitted", "stopped_run"]
    assert [event["event"] for event in of_run] == ["submitted", "stopped", "signed"]
    for first in (own[0], of_run[0]):
        assert (first["run"], first["plan_hash"], first["by"]) == (RUN, plan.hash, account())
    assert all(found.is_unbroken and found.signed_to == found.lines for found in trail.verify(home, run=None))


def test_who_is_enrolled_stands_in_the_coordinators_trail(home: Home) -> None:
    key = keys.generate()
    request = certificates.make_request(key, name="north")
    for _ in range(2):  # the same again changes nothing
        enrolment.admit(home, "north", request=request, renewed=False)
    enrolment.revoke(home, "north")
    told = [event for event in events(home, None) if event["event"] in ("enrolled", "revoked")]
    own = keys.fingerprint(key.public_key())
    assert [(event["event"], event["site"], event["key"]) for event in told] == [
        ("enrolled", "north", own),
        ("revoked", "north", own),
    ]
    assert trail.verify(home, run=None)[0].signed_to == 4


def test_the_key_signs_trails_only_and_is_for_its_owner_only(done: Home) -> None:
    assert done.trail_key.stat().st_mode & 0o777 == 0o600
    key = keys.read_private(done.trail_key).public_key()
    others = [keys.read_private(done.server_key.with_name(f"{name}.key")) for name in ("server", "authority")]
    assert keys.fingerprint(key) not in {keys.fingerprint(other.public_key()) for other in others}


def verb(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["feverfew-server", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            command.main()
    return int(end.value.code or 0)


Edit = Callable[[list[str]], list[str]]
CHANGES: dict[str, tuple[Edit, int]] = {
    "changed": (lambda lines: [lines[0].replace(account(), "mallory"), *lines[1:]], 1),
    "missing": (lambda lines: [*lines[:3], *lines[4:]], 4),
    "moved": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 4),
    "added": (lambda lines: [*lines[:3], lines[3], *lines[3:]], 5),
    "cut": (lambda lines: lines[:6], 7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_the_line_and_exits_with_1(
    done: Home, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("trail", "verify", done.directory) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"coordinator: unbroken, {len(events(done, None))} lines signed",
        f"run {RUN}: unbroken, {len(events(done))} lines signed",
    ]
    edit, line = CHANGES[change]
    path = done.runs / RUN / "events.jsonl"
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))
    assert verb("trail", "verify", done.directory) == 1
    own, told = capsys.readouterr().out.splitlines()
    assert "unbroken" in own and told.startswith(f"run {RUN}: broken at line {line}: ")
    assert verb("trail", "verify", done.directory, "--run", RUN, "--json") == 1
    tree = json.loads(capsys.readouterr().out)
    assert [found["line"] for found in tree["trails"]] == [line] and not tree["unbroken"]


def test_a_trail_of_one_run_does_not_pass_for_that_of_another(done: Home) -> None:
    plan = tiny_plan(sites=2)
    carry(done, plan, {name: site(plan, name, 0.5) for name in ("a", "b")}, run="run-2")
    for first, second in (
        (done.runs / RUN / "events.jsonl", done.runs / "run-2" / "events.jsonl"),
        (done.heads / f"{RUN}.trail", done.heads / "run-2.trail"),
    ):
        first.write_bytes(second.read_bytes())
    found = {one.trail: one.is_unbroken for one in trail.verify(done, run=None)}
    assert found == {"coordinator": True, f"run {RUN}": False, "run run-2": True}


def test_an_unknown_run_is_the_users_error(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("trail", "verify", home.directory, "--run", "none") == 2
    assert "none of the id 'none'" in capsys.readouterr().err


def test_a_broken_trail_does_not_end_a_run_and_is_not_signed(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny_plan(sites=2)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    carry(home, plan, nodes)
    path = home.runs / RUN / "events.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with caplog.at_level(logging.ERROR):
        carry(home, plan, nodes)
    end = RunRecord(directory=home.runs / RUN).end
    assert end is not None and end.status == "completed"
    assert "Expected an unbroken trail" in caplog.text and not trail.verify(home, run=RUN)[0].is_unbroken


def test_a_full_disk_does_not_end_the_coordinator(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    Trail(home.directory / "events.jsonl").record("before")
    monkeypatch.setattr(os, "write", full)
    trail.record_if_possible(home, "restarted", process="gateway")
    trail.sign(home)
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 2
    assert [event["event"] for event in events(home, None)] == ["before"]
    assert trail.verify(home, run=None)[0].is_unbroken
