from __future__ import annotations

import numpy as np
import pytest

from client import approval, waiting, work
from client.site import Site
from common import trail
from common.exchange import Task
from common.plan import Plan
from tests.plans import plan
from tests.sites import write_site


@pytest.fixture
def site(tmp_path: object) -> Site:
    return write_site(tmp_path / "north", num_patients=1, policies=[])  # type: ignore[operator]


def prepare(site: Site, asked: Plan) -> str:
    parameters = np.zeros(0, np.float32)
    task = Task(
        run="r", plan_hash=asked.hash, server_round=0, purpose="prepare", part="", parameters=parameters
    )
    return work.prepare(site, asked, task).status


def test_plan_that_comes_unapproved_waits_once_until_it_is_decided_about(site: Site) -> None:
    assert [prepare(site, plan()) for _ in range(2)] == ["waiting"] * 2
    (one,) = waiting.every(site)
    assert one.plan == plan()
    path = site.private / "waiting" / f"{plan().hash}.json"
    assert path.stat().st_mode & 0o077 == 0
    events = [event["event"] for event in trail.read(site.state / "events.jsonl")]
    assert events.count("prepared") == 1, "the same answer, again and again for days, is one event"
    approval.decide(site, plan(), "refused")
    assert waiting.every(site) == [] and prepare(site, plan()) == "declined"


def test_a_site_keeps_a_bounded_number_of_plans_and_the_newest(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MOST", 3)
    for seed in range(5):
        waiting.keep(site, plan(seed=seed))
    assert {one.plan.seed for one in waiting.every(site)} == {2, 3, 4}


@pytest.mark.parametrize("content", ["", "[]", '{"plan": {}, "since": ""}', '{"plan": 3}'])
def test_a_file_that_holds_no_plan_is_left_out(site: Site, content: str) -> None:
    waiting.keep(site, plan())
    (site.private / "waiting" / "a.json").write_text(content)
    (site.private / "waiting" / f"{plan(seed=1).hash}.json").write_text(
        (site.private / "waiting" / f"{plan().hash}.json").read_text()
    )
    assert [one.plan for one in waiting.every(site)] == [plan()]
