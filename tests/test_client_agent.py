from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message

from client import agent as agents
from client import patience, presence, skeleton, trail
from client.agent import Agent, open_agent
from client.fleet import Task, without_superseded
from client.patience import is_temporary
from client.process import forkserver
from client.route import Barred
from client.site import Site, open_site
from client.worker import Worker
from common import flower
from common.errors import DeploymentError, UserError
from common.trail import read
from tests import tiny

CONTEXT = forkserver()
CONFIG = {"plan": "{}", "run": "run-1", "extra": "never looked at"}


def refused(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://coordinator/")
    response = httpx.Response(status, json={"code": 1, "detail": "no"}, request=request)
    return httpx.HTTPStatusError("no", request=request, response=response)


class ScriptedFleet:
    """A coordinator in memory: hands out tasks, notes what is asked of it, and fails as the script says."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.failures: dict[str, list[Exception]] = {}
        self.calls: list[str] = []
        self.replies: list[Message] = []
        self.online = False
        self.known = True
        self.times: dict[str, float] = {}

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.times[name] = time.monotonic()
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def activate(self) -> int:
        self._call("activate")
        if self.online:
            raise refused(412)
        self.online = True
        return 7

    def deactivate(self, node_id: int) -> None:
        self._call(f"deactivate {node_id}")
        self.online = False

    def beat(self) -> bool:
        self._call("beat")
        return self.known

    def receive(self) -> Task | None:
        self._call("receive")
        return Task(head=self.waiting.pop(0), tree=None) if self.waiting else None

    def run_config(self, run_id: int) -> dict[str, Any]:
        self._call("run_config")
        return CONFIG

    def pull(self, task: Task) -> Message:
        self._call("pull")
        return task.head

    def drop(self, task: Task) -> None:
        self._call("drop")

    def push(self, reply: Message) -> None:
        self._call("push")
        self.replies.append(reply)

    def close(self) -> None:
        self._call("close")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    flower.set_identity(1, node_id=1)
    monkeypatch.setattr(presence, "MAX_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(patience, "MAX_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(agents, "MAX_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(agents, "MIN_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(presence, "ADMISSION_SECONDS", 0.01)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    directory = tmp_path / "north"
    skeleton.complete(directory, name="north", nominal_patients=100)
    return open_site(directory)


@pytest.fixture
def fleet() -> ScriptedFleet:
    return ScriptedFleet()


@pytest.fixture
def agent(site: Site, fleet: ScriptedFleet) -> Iterator[Agent]:
    worker = Worker("tests.tiny:client_app", context=CONTEXT, threads=1, log=site.directory / "worker.log")
    agent = Agent(site=site, fleet=fleet, worker=worker)  # type: ignore[arg-type]
    yield agent
    agent.stop()


def run_until(agent: Agent, condition: Callable[[], bool]) -> None:
    """Runs an agent in a thread until a condition holds, at most 30 seconds."""
    thread = threading.Thread(target=agent.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.01)
    held = condition()
    agent.stop()
    thread.join(10)
    assert held and not thread.is_alive()


def test_a_task_is_answered(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.waiting = [tiny.task("train")]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert (fleet.replies[0].content.array_records["arrays"]["x"].numpy() == 1).all()


def test_the_app_is_told_its_site_the_plan_and_the_run_and_nothing_else(
    agent: Agent, fleet: ScriptedFleet, site: Site
) -> None:
    fleet.waiting = [tiny.task("train.told")]
    run_until(agent, lambda: len(fleet.replies) == 1)
    told = dict(fleet.replies[0].content.config_records["config"])
    assert told == {"node site": str(site.directory.resolve()), "run plan": "{}", "run run": "run-1"}


def test_a_failure_at_the_site_leaves_it_as_a_constant_reason(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.waiting = [tiny.task("train.raises"), tiny.task("train.dies"), tiny.task("train")]
    run_until(agent, lambda: len(fleet.replies) == 3)
    reasons = [reply.error.reason for reply in fleet.replies if reply.has_error()]
    assert reasons == ["app_failed", "worker_died"] and fleet.replies[2].has_content()
    assert tiny.SECRET not in repr(fleet.replies)


@pytest.mark.parametrize("where", ["receive", "pull", "run_config"])
def test_what_is_not_a_task_costs_this_task_and_not_the_agent(
    where: str, agent: Agent, fleet: ScriptedFleet
) -> None:
    errors = [ValueError("not JSON"), KeyError("part"), RecursionError(), MemoryError()]
    fleet.failures[where] = list(errors)
    fleet.waiting = [tiny.task("train", server_round=1) for _ in range(8)]
    run_until(agent, lambda: any(not reply.has_error() for reply in fleet.replies))
    assert not fleet.failures[where]
    reasons = {reply.error.reason for reply in fleet.replies if reply.has_error()}
    assert reasons <= {"unreadable"}


def test_a_round_with_a_number_of_any_length_is_no_round(agent: Agent, fleet: ScriptedFleet) -> None:
    message = tiny.task("train")
    message.metadata.__dict__["_group_id"] = "9" * 5000
    fleet.waiting = [message]
    run_until(agent, lambda: len(fleet.replies) == 1)


def test_a_task_that_a_later_round_has_overtaken_is_declined_unread(
    agent: Agent, fleet: ScriptedFleet
) -> None:
    fleet.waiting = [tiny.task("train", server_round=number) for number in (1, 2, 3)]
    run_until(agent, lambda: len(fleet.replies) == 3)
    answers = {
        reply.metadata.group_id: reply.error.reason if reply.has_error() else "" for reply in fleet.replies
    }
    assert answers == {"1": "superseded", "2": "superseded", "3": ""}
    assert fleet.calls.count("pull") == 1 and fleet.calls.count("drop") == 2


def test_a_dead_run_does_not_end_the_agent(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.failures = {"push": [refused(403)], "pull": [refused(403)]}
    fleet.waiting = [tiny.task(f"train.{kind}") for kind in ("told", "default", "default")]
    run_until(agent, lambda: len(fleet.replies) == 1)


def test_a_reply_waits_for_the_coordinator_to_come_back(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.failures = {"push": [httpx.ConnectError("away"), refused(502), httpx.ReadTimeout("slow")]}
    fleet.waiting = [tiny.task("train")]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert fleet.calls.count("push") == 4 and fleet.calls.count("pull") == 1


def test_a_reply_is_given_up_when_the_message_has_expired(agent: Agent, fleet: ScriptedFleet) -> None:
    agent.worker.warm_up()  # on a slow machine its start may take longer than the message lives
    fleet.failures = {"push": [httpx.ConnectError("away")] * 1000}
    fleet.waiting = [tiny.task("train", ttl=2.0)]
    run_until(agent, lambda: fleet.calls.count("push") > 1 and fleet.calls[-1] == "receive")
    assert not fleet.replies


def test_a_task_that_the_coordinator_has_forgotten_does_not_hold_the_site_until_it_expires(
    agent: Agent, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperLink's data base came back from a backup: of a run that is not in it, it says error 500."""
    monkeypatch.setattr(patience, "BROKEN_SECONDS", 0.3)
    fleet.failures = {"pull": [refused(500) for _ in range(1000)]}
    fleet.waiting = [tiny.task("train", ttl=3600)]
    run_until(agent, lambda: fleet.calls.count("activate") == 2 and fleet.calls[-1] == "receive")
    assert fleet.calls.count("pull") > 2 and not fleet.replies, "it comes again, so that the server learns"


def test_a_task_of_which_not_all_parts_came_makes_the_agent_come_anew(
    agent: Agent, fleet: ScriptedFleet
) -> None:
    """The SuperLink takes it for delivered; only of a site that was away does the server learn the truth."""
    fleet.failures = {"pull": [flower.ObjectPullError("object", "connection lost")]}
    fleet.waiting = [tiny.task("train")]
    run_until(agent, lambda: fleet.calls.count("activate") == 2 and fleet.calls[-1] == "receive")
    assert fleet.calls.count("pull") == 1 and not fleet.replies


def test_a_spell_of_internal_errors_costs_no_task(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.failures = {"pull": [refused(500), httpx.ConnectError("away"), refused(500)]}
    fleet.waiting = [tiny.task("train")]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert fleet.calls.count("activate") == 1


def test_a_worker_that_does_not_answer_before_the_message_expires_is_ended(
    agent: Agent, fleet: ScriptedFleet
) -> None:
    fleet.waiting = [tiny.task("train.sleeps", ttl=0.3)]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert fleet.replies[0].error.reason == "worker_timed_out"


def test_an_agent_that_was_killed_ends_its_former_life_first(
    agent: Agent, fleet: ScriptedFleet, site: Site
) -> None:
    site.state.mkdir()
    (site.state / "node").write_text("7\n")
    fleet.online = True
    run_until(agent, lambda: "receive" in fleet.calls)
    assert fleet.calls[:2] == ["deactivate 7", "activate"]


def test_a_site_that_is_not_admitted_yet_keeps_asking(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.failures = {"activate": [refused(412), httpx.ConnectError("away"), refused(401)]}
    run_until(agent, lambda: "receive" in fleet.calls)
    assert fleet.calls.count("activate") == 4


def test_an_answer_that_got_lost_makes_the_agent_come_anew(agent: Agent, fleet: ScriptedFleet) -> None:
    fleet.failures = {"receive": [httpx.ReadError("cut")]}
    run_until(agent, lambda: fleet.calls.count("receive") > 1)
    assert fleet.calls.count("activate") == 2


@pytest.mark.parametrize("away", [httpx.ConnectError("away"), refused(503)])
def test_a_coordinator_that_is_away_loses_nothing(
    agent: Agent, fleet: ScriptedFleet, away: Exception
) -> None:
    fleet.failures = {"receive": [away]}
    fleet.waiting = [tiny.task("train")]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert fleet.calls.count("activate") == 1


def test_a_way_that_is_barred_is_told_once_for_each_reason_and_so_is_its_end(
    agent: Agent, fleet: ScriptedFleet, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = ("forbids", "forbids", "is broken open", "forbids")
    fleet.failures = {"receive": [Barred(f"the proxy {why}") for why in reasons]}
    fleet.waiting = [tiny.task("train")]
    with caplog.at_level("INFO", logger="feverfew"):
        run_until(agent, lambda: len(fleet.replies) == 1)
    told = [line for line in caplog.messages if "the coordinator" in line]
    assert [("forbids" in line, "broken open" in line, "answers again" in line) for line in told] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert fleet.calls.count("activate") == 1, "nothing was sent, so nothing is lost"


def test_a_wrong_clock_is_told_and_work_goes_on_when_it_is_set_right(
    agent: Agent, fleet: ScriptedFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.failures = {"receive": [refused(425)], "activate": [], "push": [refused(425)] * 3}
    fleet.waiting = [tiny.task("train")]
    with caplog.at_level("WARNING", logger="feverfew"):
        run_until(agent, lambda: len(fleet.replies) == 1)
    assert any("the coordinator refuses this site: no" in line for line in caplog.messages)
    assert fleet.calls.count("push") == 4 and fleet.calls.count("pull") == 1


class OneRenewal:
    """Offers a connection with a renewed key once it is there."""

    def __init__(self) -> None:
        self.fleet: ScriptedFleet | None = None
        self.kept = False

    def renewed(self) -> ScriptedFleet | None:
        return None if self.kept else self.fleet

    def keep(self) -> None:
        self.kept = True


def test_an_agent_goes_on_with_a_renewed_key_and_is_never_away(
    agent: Agent, fleet: ScriptedFleet, site: Site
) -> None:
    access, renewed = OneRenewal(), ScriptedFleet()
    agent.presence.access = access  # type: ignore[assignment]
    renewed.failures = {"activate": [refused(412)]}
    renewed.waiting = [tiny.task("train")]
    fleet.waiting = [tiny.task("train")]
    former_goes: list[bool] = []
    deactivate = fleet.deactivate

    def noted(node_id: int) -> None:
        former_goes.append(renewed.online)
        deactivate(node_id)

    fleet.deactivate = noted  # type: ignore[method-assign]

    def is_done() -> bool:
        if fleet.replies:
            access.fleet = renewed
        return bool(renewed.replies)

    run_until(agent, is_done)
    assert renewed.calls.count("activate") == 2 and access.kept
    assert former_goes == [True], "the former node goes once the new one is there"
    assert (len(fleet.replies), len(renewed.replies)) == (1, 1)


def test_a_heartbeat_that_is_not_recognised_makes_the_agent_come_anew(
    agent: Agent, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.05)
    fleet.known = False
    run_until(agent, lambda: fleet.calls.count("activate") > 1)


def test_heartbeats_go_on_while_the_worker_works(
    agent: Agent, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.02)
    fleet.waiting = [tiny.task("train.sleeps", ttl=0.5)]
    run_until(agent, lambda: len(fleet.replies) == 1)
    assert fleet.calls[fleet.calls.index("pull") : fleet.calls.index("push")].count("beat") > 5


def test_only_one_agent_works_for_a_site(agent: Agent, fleet: ScriptedFleet, site: Site) -> None:
    second = Agent(site=site, fleet=ScriptedFleet(), worker=agent.worker)  # type: ignore[arg-type]

    def second_is_refused() -> bool:
        if not (site.state / "agent.pid").exists():
            return False
        with pytest.raises(UserError, match="running agent"):
            second.run()
        return True

    run_until(agent, second_is_refused)


def test_an_agent_says_goodbye_and_leaves_no_pid_file(agent: Agent, fleet: ScriptedFleet, site: Site) -> None:
    run_until(agent, lambda: (site.state / "agent.pid").exists() and "receive" in fleet.calls)
    assert fleet.calls[-2:] == ["deactivate 7", "close"] and not fleet.online
    assert not (site.state / "agent.pid").exists() and agent.worker.pid is None


def test_an_app_that_does_not_load_ends_the_agent_before_it_says_hello(
    site: Site, fleet: ScriptedFleet
) -> None:
    worker = Worker("tests.tiny:no_such_app", context=CONTEXT, threads=1, log=site.directory / "log")
    with pytest.raises(DeploymentError):
        Agent(site=site, fleet=fleet, worker=worker).run()  # type: ignore[arg-type]
    assert fleet.calls == ["close"]


def test_tasks_of_other_runs_and_kinds_are_not_overtaken() -> None:
    first, second = tiny.task("train", server_round=1), tiny.task("train", server_round=2)
    flower.set_identity(2, node_id=1)
    other_run, other_kind = tiny.task("train"), tiny.task("evaluate", server_round=1)
    kept, superseded = without_superseded(
        Task(head=m, tree=None) for m in (first, second, other_run, other_kind)
    )
    assert [task.head for task in superseded] == [first]
    assert [task.head for task in kept] == [second, other_run, other_kind]


def test_what_may_pass_is_told_from_what_will_not() -> None:
    assert all(is_temporary(refused(status)) for status in (408, 425, 429, 500, 502, 503, 504))
    assert not any(is_temporary(refused(status)) for status in (400, 401, 403, 404, 412, 413))
    assert is_temporary(httpx.ConnectError("")) and is_temporary(httpx.ReadTimeout(""))


def test_a_site_without_an_invitation_is_told_what_to_do(site: Site) -> None:
    with pytest.raises(UserError, match="--invitation"):
        open_agent(site)


def test_the_trail_tells_when_the_agent_began_what_it_sent_and_what_it_could_not_send(
    agent: Agent, fleet: ScriptedFleet, site: Site
) -> None:
    fleet.failures = {"push": [refused(403)]}
    fleet.waiting = [tiny.task("train"), tiny.task("train.raises", server_round=2)]
    run_until(agent, lambda: len(fleet.replies) == 1)
    told = [
        (event["event"], event.get("round"), event.get("outcome"))
        for event in read(site.state / "events.jsonl")
    ]
    assert told == [
        ("started", None, None),
        ("not_sent", 1, "answered"),
        ("sent", 2, "error: app_failed"),
        ("stopped", None, None),
        ("signed", None, None),
    ]
    assert trail.verify(site).signed_to == 5
