from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client import release, replies
from client.ledger import Outcome
from client.replies import Reply
from client.site import Site, open_site
from common import trail
from common.errors import LedgerError, Refusal, StateError
from common.exchange import Task
from common.plan import Plan
from common.privacy import Spend, epsilon
from tests.plans import plan
from tests.sites import write_site

FINISH = """
import sys
from pathlib import Path
from client import release
from client.ledger import Outcome
from client.site import open_site
with release.open_ledger(open_site(Path(sys.argv[1]))) as ledger:
    ledger.finish("another", Outcome(kind="failed", code="site_error"))
"""
SPEND = Spend(noise_multiplier=2.0, sample_rate=1.0, steps=1)
PLAN = plan()
TASK = Task(
    run="run-1",
    plan_hash=PLAN.hash,
    server_round=1,
    purpose="train",
    part="",
    parameters=np.zeros(3, dtype=np.float32),
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1, max_epsilon=100.0, max_repeats=1)


class Work:
    """Makes another reply at every call, and counts them."""

    def __init__(self, fails_with: Exception | None = None) -> None:
        self.num_calls = 0
        self._fails_with = fails_with

    def __call__(self) -> Reply:
        self.num_calls += 1
        if self._fails_with is not None:
            raise self._fails_with
        return Reply(arrays={"update": np.random.default_rng().normal(size=3)}, fields={"weight": 1.0})


def once(
    site: Site,
    work: Callable[[], Reply],
    *,
    task: Task = TASK,
    spend: Spend | None = SPEND,
    asked: Plan = PLAN,
) -> Reply:
    return release.once(site, asked, task, part="train", spend=spend, work=work)


def refusal(site: Site, work: Callable[[], Reply], *, task: Task = TASK, asked: Plan = PLAN) -> str:
    with pytest.raises(Refusal) as caught:
        once(site, work, task=task, asked=asked)
    return caught.value.code


def num_releases(site: Site) -> int:
    """How many releases the ledger has been charged, read off its epsilon."""
    with release.open_ledger(site) as ledger:
        spent = ledger.spent().value
    costs = [epsilon([SPEND] * count, delta=site.settings.delta).value for count in range(6)]
    return costs.index(spent)


def outcome(site: Site, task: Task = TASK) -> Outcome | None:
    with release.open_ledger(site) as ledger:
        return ledger.outcome(task.identity)


def charge_only(site: Site) -> None:
    """Leaves a site as a crash between charge and work does."""

    class Killed(BaseException):
        pass

    def killed() -> Reply:
        raise Killed

    with pytest.raises(Killed):
        once(site, killed)
    assert num_releases(site) == 1
    assert outcome(site) is None


def test_task_is_charged_done_and_stored(site: Site) -> None:
    reply = once(site, Work())
    assert num_releases(site) == 1
    assert outcome(site) == Outcome(kind="stored", code="")
    stored = replies.load(site.state / "replies", TASK.identity)
    assert stored is not None
    assert stored.arrays["update"].tobytes() == reply.arrays["update"].tobytes()


def test_head_that_is_told_is_the_last_row_also_where_another_process_wrote_it(site: Site) -> None:
    for server_round in (1, 2):
        once(site, Work(), task=dataclasses.replace(TASK, server_round=server_round))
        with release.open_ledger(site) as ledger:
            assert release.ledger_head(site) == ledger.head
    subprocess.run([sys.executable, "-c", FINISH, str(site.directory)], check=True)
    with release.open_ledger(site) as ledger:
        assert ledger.head.number == 5
        assert release.ledger_head(site) == ledger.head


def test_head_of_an_old_copy_is_not_told(site: Site) -> None:
    once(site, Work())
    old = release.ledger_path(site).read_bytes()
    once(site, Work(), task=dataclasses.replace(TASK, server_round=2))
    assert release.ledger_head(site) is not None
    release.ledger_path(site).write_bytes(old)
    with pytest.raises(LedgerError, match="no row 4"):
        release.ledger_head(site)


def test_forged_head_beside_the_ledger_stops_the_next_charge(site: Site) -> None:
    once(site, Work())
    head = release.head_path(site)
    forged = head.read_text().replace('"number": 2', '"number": 1')
    assert forged != head.read_text()
    head.write_text(forged)
    with pytest.raises(LedgerError, match="signed by this site's key"):
        once(site, Work(), task=dataclasses.replace(TASK, server_round=2))


def test_charge_is_on_disk_before_work_begins(site: Site) -> None:
    def work() -> Reply:
        assert num_releases(site) == 1
        return Work()()

    once(site, work)


def test_repeated_task_gets_the_stored_reply_bit_for_bit_without_another_charge(site: Site) -> None:
    work = Work()
    first = once(site, work)
    again = once(open_site(site.directory), work)
    assert again.arrays["update"].tobytes() == first.arrays["update"].tobytes()
    assert again.fields == first.fields
    assert work.num_calls == 1
    assert num_releases(site) == 1


def test_charge_without_outcome_is_worked_off_under_the_same_charge(site: Site) -> None:
    charge_only(site)
    work = Work()
    once(site, work)
    assert work.num_calls == 1
    assert num_releases(site) == 1
    assert outcome(site) == Outcome(kind="stored", code="")
    events = [event["event"] for event in trail.read(site.state / "events.jsonl")]
    assert events == ["approved", "charged", "charged_before"]


def test_stored_reply_without_outcome_is_sent_and_not_made_again(site: Site) -> None:
    """A crash between storing the reply and noting it: the reply may be as good as sent."""
    charge_only(site)
    stored = Work()()
    replies.store(site.state / "replies", TASK.identity, stored)
    work = Work()
    reply = once(site, work)
    assert work.num_calls == 0
    assert reply.arrays["update"].tobytes() == stored.arrays["update"].tobytes()
    assert outcome(site) == Outcome(kind="stored", code="")
    assert num_releases(site) == 1


def test_failure_after_the_charge_uses_it_up_and_the_same_code_comes_back(site: Site) -> None:
    with pytest.raises(ZeroDivisionError):
        once(site, Work(fails_with=ZeroDivisionError("patient 4711")))
    assert outcome(site) == Outcome(kind="failed", code="site_error")
    work = Work()
    assert refusal(site, work) == "site_error"
    assert refusal(site, work) == "site_error"
    assert work.num_calls == 0
    assert num_releases(site) == 1


def test_released_reply_whose_file_is_gone_is_not_made_twice(site: Site) -> None:
    once(site, Work())
    (site.state / "replies" / f"{TASK.identity}.safetensors").unlink()
    work = Work()
    assert refusal(site, work) == "reply_gone"
    assert work.num_calls == 0
    assert num_releases(site) == 1


def test_damaged_reply_is_neither_sent_nor_made_twice(site: Site) -> None:
    once(site, Work())
    path = site.state / "replies" / f"{TASK.identity}.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    work = Work()
    with pytest.raises(StateError):
        once(site, work)
    assert work.num_calls == 0


def test_nothing_is_done_over_the_budget(tmp_path: Path) -> None:
    poor = write_site(tmp_path / "poor", num_patients=1, max_epsilon=0.1)
    work = Work()
    assert refusal(poor, work) == "budget_exceeded"
    assert work.num_calls == 0
    assert num_releases(poor) == 0
    assert not (poor.state / "replies").exists()


def test_nothing_is_charged_without_approval(tmp_path: Path) -> None:
    careful = write_site(tmp_path / "careful", num_patients=1, max_epsilon=100.0, policies=[])
    work = Work()
    assert refusal(careful, work) == "not_approved"
    assert work.num_calls == 0
    assert not careful.state.exists()


def test_stored_reply_is_not_sent_once_approval_is_gone(site: Site) -> None:
    once(site, Work())
    seeded = plan(randomness="seeded")
    assert refusal(site, Work(), asked=seeded) == "seeded_noise"


def test_same_round_with_other_parameters_is_a_charge_of_its_own_and_not_endless(site: Site) -> None:
    """max_repeats is 1 here."""
    tasks = [dataclasses.replace(TASK, parameters=np.full(3, value, np.float32)) for value in (0, 1, 2)]
    work = Work()
    once(site, work, task=tasks[0])
    once(site, work, task=tasks[1])
    assert refusal(site, work, task=tasks[2]) == "too_many_repeats"
    assert work.num_calls == 2
    assert num_releases(site) == 2


def test_what_releases_nothing_private_is_not_charged_but_stored_all_the_same(site: Site) -> None:
    work = Work()
    first = once(site, work, spend=None)
    again = once(site, work, spend=None)
    assert again.arrays["update"].tobytes() == first.arrays["update"].tobytes()
    assert work.num_calls == 1
    assert num_releases(site) == 0


def test_state_can_be_read_by_its_owner_only(site: Site) -> None:
    once(site, Work())
    assert site.state.stat().st_mode & 0o077 == 0
