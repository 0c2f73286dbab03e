"""Sites that wait for approval, come later, come again or are revoked while a run is on."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from common import exchange, model
from common.flower import ErrorCode
from common.plan import Plan
from common.trail import Trail, read
from server import app, approvals, checkpoint
from server.checkpoint import RunState
from server.heads import Heads
from server.report import Report
from server.revoked import revoked_sites
from server.rounds import Rounds
from server.strategy import FedAvg
from tests.grid import Behaviour, InlineGrid
from tests.rounds import moved, run, site, tiny_plan


def test_a_site_that_is_not_approved_is_never_asked_to_train(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 3, "rounds": 1})
    asked: list[str] = []

    def remember(record: RecordDict, message: Message) -> RecordDict:
        asked.append("waiting")
        return record

    nodes = {
        "a": site(plan, "a", 0.5),
        "b": site(plan, "b", 0.5),
        "c": site(plan, "c", 0.5, edit=remember, status="waiting", reason="not_approved"),
    }
    rounds = run(plan, nodes, tmp_path)
    assert not asked
    assert rounds.state.rounds[0].sites_asked == 2
    assert rounds.state.sites["c"].reason == "not_approved"


def undecided(plan: Plan, name: str, *, asked: int, status: str = "approved") -> Behaviour:
    """A site at which a person decides after so many queries."""
    count: list[int] = []

    def behave(message: Message) -> Message | None:
        if exchange.read_task(message.content).purpose == "prepare":
            count.append(1)
        waits = len(count) <= asked
        said = {"status": "waiting", "reason": "not_approved"} if waits else {"status": status}
        return site(plan, name, 0.5, **said)(message)

    return behave


def prepared_of(directory: Path, name: str) -> list[str]:
    events = read(directory / "events.jsonl")
    return [one["status"] for one in events if one["event"] == "site_prepared" and one["site"] == name]


@pytest.mark.parametrize("status", ["approved", "declined"])
@pytest.mark.slow
def test_the_run_begins_as_soon_as_every_site_has_decided(tmp_path: Path, status: str) -> None:
    plan = tiny_plan(sites=3, rounds=1, approval_deadline_seconds=86400)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=3, status=status)
    began = time.monotonic()
    rounds = run(plan, nodes, tmp_path)
    assert 1.0 < time.monotonic() - began < 10
    assert rounds.state.rounds[0].sites_asked == (3 if status == "approved" else 2)
    assert rounds.state.waiting_since == {}
    assert prepared_of(tmp_path, "c") == ["waiting", status], "an answer that stays the same is told once"


def test_the_run_begins_at_the_approval_deadline_with_those_that_have_approved(tmp_path: Path) -> None:
    plan = tiny_plan(sites=3, rounds=1, approval_deadline_seconds=1.5)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=1000)
    began = time.monotonic()
    rounds = run(plan, nodes, tmp_path)
    assert 1.4 < time.monotonic() - began < 10
    assert rounds.state.rounds[0].sites_asked == 2 and set(rounds.state.waiting_since) == {"c"}


def test_without_an_approval_deadline_nobody_is_waited_for(tmp_path: Path) -> None:
    plan = tiny_plan(sites=3, rounds=1, approval_deadline_seconds=0)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=1000)
    rounds = run(plan, nodes, tmp_path)
    assert rounds.state.rounds[0].sites_asked == 2
    assert "approval_awaited" not in {one["event"] for one in read(tmp_path / "events.jsonl")}


def test_enough_sites_that_have_approved_do_not_wait_for_another(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=1, approval_deadline_seconds=86400)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=1000)
    assert run(plan, nodes, tmp_path).state.rounds[0].sites_asked == 2


@pytest.mark.slow
def test_a_site_that_is_approved_in_the_middle_of_a_run_joins_at_the_next_round(tmp_path: Path) -> None:
    plan = tiny_plan(sites=3, rounds=4)

    def slow(record: RecordDict, message: Message) -> RecordDict:
        time.sleep(0.4)
        return record

    nodes = {name: site(plan, name, 0.5, edit=slow) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=2)
    rounds = run(plan, nodes, tmp_path)
    asked = [one.sites_asked for one in rounds.state.rounds]
    assert asked[0] == 2 and asked[-1] == 3, asked
    assert rounds.state.waiting_since == {}


def test_a_restart_does_not_wait_for_approval_as_long_again(tmp_path: Path) -> None:
    """The deadline counts from when the site said first that it waits, whatever process asked it."""
    plan = tiny_plan(sites=3, rounds=1, approval_deadline_seconds=86400)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    killed: list[bool] = []

    def dies(message: Message) -> Message | None:
        if killed:
            raise KeyboardInterrupt  # what a killed process is to its caller
        killed.append(True)
        return undecided(plan, "c", asked=1)(message)

    with pytest.raises(KeyboardInterrupt):
        run(plan, {**nodes, "c": dies}, tmp_path)
    state = checkpoint.latest(tmp_path / "checkpoints", run="r", plan_hash=plan.hash)
    assert state is not None and state.server_round == 0
    assert set(state.waiting_since) == {"c"}
    first = datetime.fromisoformat(state.waiting_since["c"])
    assert 0 <= (datetime.now(UTC) - first).total_seconds() < 30
    past = {"c": (first - timedelta(days=2)).isoformat()}
    began = time.monotonic()
    nodes["c"] = undecided(plan, "c", asked=1000)
    rounds = run(plan, nodes, tmp_path, state=replace(state, waiting_since=past))
    assert time.monotonic() - began < 10
    assert rounds.state.rounds[0].sites_asked == 2 and rounds.state.waiting_since == past


def test_the_report_tells_who_waits_and_since_when_and_who_is_of_another_version(tmp_path: Path) -> None:
    plan = tiny_plan(sites=4, rounds=1)
    nodes = {name: site(plan, name, 0.5) for name in ("a", "b")}
    nodes["c"] = undecided(plan, "c", asked=1000)
    nodes["d"] = site(plan, "d", 0.5, status="incompatible", reason="incompatible_plan", feverfew="9.9")
    app.coordinate(
        InlineGrid(nodes), plan, run="r", directory=tmp_path, heads=Heads(tmp_path / "heads"), engine="test"
    )
    told = Report.read(tmp_path).participation
    since = told["c"].waiting_since
    assert since is not None and abs((datetime.now(UTC) - since).total_seconds()) < 60
    assert told["c"].status == "waiting" and "nobody there has approved the plan" in told["c"].story
    assert told["d"].story == "incompatible: incompatible_plan; it has Feverfew 9.9"
    assert told["a"].waiting_since is None


@pytest.mark.parametrize("when", ["in a round", "between rounds", "before it trained"])
def test_a_revoked_site_is_called_so_and_not_missing(tmp_path: Path, when: str) -> None:
    plan = tiny_plan(sites=3, rounds=4, quorum=2)
    certificates = tmp_path / "sites"
    certificates.mkdir()
    for name in "abc":
        (certificates / f"{name}.1.crt").touch()
    nodes = {name: site(plan, name, 0.5) for name in "abc"}
    grid = InlineGrid(nodes)
    last = 1 if when == "before it trained" else 2
    (number,) = (node for node, name in grid.names.items() if name == "b")
    answer = grid.behaviours[number]

    def revoked_meanwhile(message: Message) -> Message | None:
        record = message.content.config_records.get("task", {})
        if message.metadata.message_type == "train" and record["server-round"] == last:
            (certificates / "b.1.crt").rename(certificates / "b.1.revoked")
            grid.unregistered.add(number)
            del grid.names[number]
            lost = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="")
            return answer(message) if when == "between rounds" else Message(lost, reply_to=message)
        return answer(message)

    grid.behaviours[number] = revoked_meanwhile
    app.coordinate(
        grid,
        plan,
        run="r",
        directory=tmp_path,
        heads=Heads(tmp_path / "heads"),
        engine="test",
        revoked=lambda: revoked_sites(certificates),
    )
    told = Report.read(tmp_path)
    assert told.status == "completed"
    assert told.participation["b"].status == "revoked"
    assert (
        told.participation["b"].story
        == {
            "in a round": "revoked by the coordinator; before, it trained 1 of 4 rounds; "
            "went away over 1 tasks, which were sent again",
            "between rounds": "revoked by the coordinator; before, it trained 2 of 4 rounds",
            "before it trained": "revoked before it sent anything valid",
        }[when]
    )
    assert "missing" not in (tmp_path / "report.json").read_text()
    codes = [event["code"] for event in read(tmp_path / "events.jsonl") if event["event"] == "reply_rejected"]
    assert codes == ([] if when == "between rounds" else ["revoked"]), "it is asked no more after that"
    assert told.participation["a"].story == "trained 4 of 4 rounds"


def test_a_site_that_was_enrolled_again_is_not_called_revoked(tmp_path: Path) -> None:
    for name in ("a.1.revoked", "a.2.crt", "b.1.crt", "c.1.revoked", "d.1.retired", "d.2.crt"):
        (tmp_path / name).touch()
    assert revoked_sites(tmp_path) == {"c"}
    assert revoked_sites(tmp_path / "nowhere") == frozenset()


def test_a_clock_that_was_put_back_does_not_lengthen_the_deadline() -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert approvals.seconds_left({"c": tomorrow}, deadline_seconds=60) == 60


def test_a_site_that_claims_another_name_is_not_admitted(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 3, "rounds": 1})
    nodes = {
        "a": site(plan, "a", 0.5),
        "b": site(plan, "b", 0.5),
        "c": site(plan, "a", 8.0),
    }
    rounds = run(plan, nodes, tmp_path)
    np.testing.assert_allclose(moved(rounds, plan), 0.5, atol=1e-6)
    codes = [e["code"] for e in read(tmp_path / "events.jsonl") if e["event"] == "site_rejected"]
    assert codes == ["other_name"]


def test_a_newcomer_joins_at_the_next_round(tmp_path: Path) -> None:
    plan = tiny_plan(**{"sites": 2, "rounds": 2})
    grid_nodes = {"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5)}
    grid = InlineGrid(grid_nodes)
    start = model.flatten(model.build(plan))
    state = RunState(
        run="r", plan_hash=plan.hash, server_round=0, parameters=start, started="2026-01-01T00:00:00+00:00"
    )

    def save(state: RunState) -> None:
        grid.names[9], grid.behaviours[9] = "late", site(plan, "late", 0.5)

    rounds = Rounds(
        grid,
        plan=plan,
        state=state,
        strategy=lambda of: FedAvg(nodes=of, bound=16.0, ttl_seconds=60),
        trail=Trail(tmp_path / "events.jsonl"),
        heads=Heads(tmp_path / "heads"),
        save=save,
    )
    rounds.run()
    assert [entry.sites_asked for entry in rounds.state.rounds] == [2, 3]
    assert set(rounds.state.sites) == {"a", "b", "late"}
