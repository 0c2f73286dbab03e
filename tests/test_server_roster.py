"""Sites whose key is renewed or revoked while a run is on: one name, one task, whatever node it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from common import exchange, model
from common.errors import QuorumNotReached
from common.plan import Plan
from common.trail import Trail, read
from server.checkpoint import RunState
from server.heads import Heads
from server.mailbox import Mailbox
from server.roster import Roster
from server.rounds import Rounds
from server.strategy import FedAvg
from tests.grid import InlineGrid
from tests.rounds import site, tiny_plan

OLD, NEW = 2, 9


def rounds_over(
    grid: InlineGrid, plan: Plan, directory: Path, *, after_a_round: Callable[[], Any] = lambda: None
) -> Rounds:
    start = model.flatten(model.build(plan))
    begun = "2026-01-01T00:00:00+00:00"
    rounds = Rounds(
        grid,
        plan=plan,
        state=RunState(run="r", plan_hash=plan.hash, server_round=0, parameters=start, started=begun),
        strategy=lambda of: FedAvg(nodes=of, bound=16.0, ttl_seconds=60),
        trail=Trail(directory / "events.jsonl"),
        heads=Heads(directory / "heads"),
        save=lambda _: after_a_round(),
    )
    return rounds


def asked(grid: InlineGrid, kind: str) -> list[int]:
    pushed = [message.metadata for message in grid.pushed]
    return [one.dst_node_id for one in pushed if one.message_type == kind and one.dst_node_id in (OLD, NEW)]


def test_a_site_with_two_nodes_is_asked_once_under_the_newest(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=3)
    grid = InlineGrid({"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5)})

    def renew() -> None:
        grid.names[NEW], grid.behaviours[NEW] = "a", site(plan, "a", 0.5)

    rounds = rounds_over(grid, plan, tmp_path, after_a_round=renew)
    rounds.run()
    assert asked(grid, exchange.TRAIN) == [OLD, NEW, NEW]
    assert asked(grid, exchange.PREPARE) == [OLD], "it is the same site"
    assert [entry.sites_valid for entry in rounds.state.rounds] == [2, 2, 2]
    assert asked(grid, exchange.DELIVER) == [NEW]
    assert not [event for event in read(tmp_path / "events.jsonl") if event["event"] == "site_rejected"]


def test_a_site_that_was_renewed_before_the_run_is_asked_once(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=1)
    grid = InlineGrid({"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5)})
    grid.names[NEW], grid.behaviours[NEW] = "a", site(plan, "a", 0.5)
    rounds_over(grid, plan, tmp_path).run()
    assert asked(grid, exchange.PREPARE) == asked(grid, exchange.TRAIN) == [NEW]


def test_a_task_that_was_lost_with_the_former_node_goes_to_the_new_one(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=1, reply_deadline_seconds=5)

    def lost(record: RecordDict, message: Message) -> Message:
        del grid.names[OLD]
        grid.names[NEW], grid.behaviours[NEW] = "a", site(plan, "a", 0.5)
        return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)

    grid = InlineGrid({"a": site(plan, "a", 0.5, edit=lost), "b": site(plan, "b", 0.5)})
    rounds = rounds_over(grid, plan, tmp_path)
    rounds.run()
    assert asked(grid, exchange.TRAIN) == [OLD, NEW]
    assert rounds.state.rounds[0].sites_valid == 2 and rounds.state.attendance["a"].valid == 1


def test_a_run_goes_on_at_once_without_a_site_that_was_unregistered(tmp_path: Path) -> None:
    plan = tiny_plan(sites=3, rounds=2, reply_deadline_seconds=30)

    def revoked(record: RecordDict, message: Message) -> Message:
        grid.unregistered.add(OLD)
        grid.names.pop(OLD, None)
        return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)

    nodes = {"a": site(plan, "a", 0.5, edit=revoked), "b": site(plan, "b", 0.5), "c": site(plan, "c", 0.5)}
    grid = InlineGrid(nodes)
    rounds = rounds_over(grid, plan, tmp_path)
    begun = time.monotonic()
    rounds.run()
    assert time.monotonic() - begun < 10
    assert [entry.sites_valid for entry in rounds.state.rounds] == [2, 2]
    assert rounds.state.attendance["a"].problems == {"missing": 3}, "two rounds and the delivery"


def test_a_run_of_unregistered_sites_only_ends_at_once(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=1, quorum=1, reply_deadline_seconds=30)
    grid = InlineGrid({"a": site(plan, "a", 0.5), "b": site(plan, "b", 0.5)})
    grid.unregistered = {2, 3}
    begun = time.monotonic()
    with pytest.raises(QuorumNotReached):
        rounds_over(grid, plan, tmp_path).run()
    assert time.monotonic() - begun < 10


def test_a_node_that_takes_another_name_leaves_its_former_to_others(
    tmp_path: Path,
) -> None:
    """A waiting site is asked again, and may be called otherwise by then."""
    plan = tiny_plan(sites=3, rounds=1)
    told: list[str] = []

    def renamed(message: Message) -> Message | None:
        told.append("c" if told else "b")
        facts = {"status": "waiting", "reason": "not_approved"} if told == ["b"] else {}
        return site(plan, told[-1], 0.5, **facts)(message)

    grid = InlineGrid({"a": site(plan, "a", 0.5), "other": renamed})
    grid.names = {OLD: "", 3: ""}
    mailbox = Mailbox(grid)
    trail = Trail(tmp_path / "events.jsonl")
    roster = Roster(mailbox, plan=plan, run="r", trail=trail, heads=Heads(tmp_path / "heads"))
    roster.admit_newcomers()
    assert roster.waiting == ["b"] and roster.nodes("train") == {"a": OLD}
    roster._ask_again = 0.0
    grid.names[NEW], grid.behaviours[NEW] = "", site(plan, "b", 0.5)
    roster.admit_newcomers()
    assert roster.nodes("train") == {"a": OLD, "b": NEW, "c": 3}
    assert not [event for event in read(tmp_path / "events.jsonl") if event["event"] == "site_rejected"]


def test_a_site_that_is_revoked_between_two_rounds_is_asked_no_more(tmp_path: Path) -> None:
    plan = tiny_plan(sites=2, rounds=1)
    mailbox = Mailbox(InlineGrid({name: site(plan, name, 0.5) for name in ("a", "b")}))
    roster = Roster(
        mailbox, plan=plan, run="r", trail=Trail(tmp_path / "events.jsonl"), heads=Heads(tmp_path / "heads")
    )
    roster.gather()
    assert list(roster.nodes("train")) == ["a", "b"]
    roster.strike({"a"})
    roster.admit_newcomers()
    assert list(roster.nodes("train")) == ["b"]
