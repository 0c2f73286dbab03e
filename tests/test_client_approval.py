from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client import approval, decision, rehearsal, waiting
from client.site import Site, open_site
from common import keys
from common.errors import Refusal, UserError
from common.plan import Plan
from common.trail import account
from tests.plans import TINY, plan
from tests.sites import EVERY_PLAN, write_site

NEVER = {"name": "never", "decision": "refuse", "when": {"studies": ["chest-demo"]}}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1, policies=[])


def refusal(site: Site, asked: Plan) -> str:
    with pytest.raises(Refusal) as caught:
        approval.require(site, asked)
    return caught.value.code


def with_policies(site: Site, *policies: dict[str, Any]) -> Site:
    """The same directory after its ``site.yaml`` got other rules."""
    import yaml

    path = site.directory / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"policies": list(policies)}))
    return open_site(site.directory)


def test_plan_is_refused_until_a_person_approved_exactly_it(site: Site) -> None:
    assert refusal(site, plan()) == "not_approved"
    approval.decide(site, plan(), "approved")
    approval.require(site, plan())
    for other in (plan(seed=1), plan(rounds=21), plan(privacy__target_epsilon=3.1)):
        assert refusal(site, other) == "not_approved"


def test_refused_plan_is_declined_and_can_be_approved_later(site: Site) -> None:
    approval.decide(site, plan(), "refused", reason="not our question")
    assert refusal(site, plan()) == "plan_refused"
    approval.decide(site, plan(), "approved")
    approval.require(site, plan())


def test_withdrawn_approval_is_none_from_the_next_task_on(site: Site) -> None:
    with pytest.raises(UserError, match="to withdraw"):
        approval.decide(site, plan(), "withdrawn")
    approval.decide(site, plan(), "approved")
    approval.decide(site, plan(), "withdrawn", reason="the ethics board asks again")
    assert refusal(site, plan()) == "not_approved"


def test_persons_word_about_a_plan_wins_over_a_rule_that_approves(tmp_path: Path) -> None:
    site = write_site(tmp_path / "south", num_patients=1, policies=[EVERY_PLAN])
    approval.require(site, plan())
    approval.decide(site, plan(), "withdrawn")
    assert refusal(site, plan()) == "not_approved"
    approval.decide(site, plan(), "refused")
    assert refusal(site, plan()) == "plan_refused"
    approval.require(site, plan(seed=1))


@pytest.mark.parametrize("rules", [(NEVER,), (EVERY_PLAN, NEVER), (NEVER, EVERY_PLAN)])
def test_rule_that_refuses_wins_over_a_persons_approval_and_over_rules_wherever_they_stand(
    site: Site, rules: tuple[dict[str, Any], ...]
) -> None:
    approval.decide(site, plan(), "approved")
    strict = with_policies(site, *rules)
    assert refusal(strict, plan()) == "plan_refused"
    told = decision.find(strict, plan().hash, by="rule")
    assert told is not None and (told.verdict, told.who) == ("refused", "never")
    approval.require(with_policies(site), plan())  # the person's approval is still there


def test_rule_that_decided_is_recorded_signed_and_once(tmp_path: Path) -> None:
    site = write_site(tmp_path / "south", num_patients=1, policies=[EVERY_PLAN])
    for _ in range(2):
        approval.require(site, plan())
    (told,) = decision.every(site)
    assert (told.by, told.who, told.verdict, told.plan) == ("rule", "every plan", "approved", plan())
    events = [json.loads(line) for line in (site.state / "events.jsonl").read_text().splitlines()]
    assert [(one["event"], one["by"]) for one in events] == [("approved", "rule every plan")]
    assert refusal(with_policies(site), plan()) == "not_approved", "without its rule a record is no approval"


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"{",
        b'{"verdict": "refused", "who": "every plan"}',
        b'{"verdict": "approved", "who": "chest study"}',
    ],
)
def test_note_of_a_rules_decision_that_says_something_else_is_written_anew(
    tmp_path: Path, note: bytes
) -> None:
    site = write_site(tmp_path / "south", num_patients=1, policies=[EVERY_PLAN])
    approval.require(site, plan())
    (path,) = site.approvals.iterdir()
    path.write_bytes(note)
    approval.require(site, plan())
    (told,) = decision.every(site)
    assert (told.who, told.verdict) == ("every plan", "approved")


def forge(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": ""},
        {"who": "somebody else"},
        {"time": "2020-01-01T00:00:00+00:00"},
        {"plan": plan(seed=1).model_dump(mode="json")},
        {"plan_hash": plan(seed=1).hash},
        {"site": "south"},
        {"by": "rule"},
        {"colour": "red"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_changed_record_is_no_approval(site: Site, changes: dict[str, Any]) -> None:
    approval.decide(site, plan(), "approved")
    (path,) = site.approvals.iterdir()
    forge(path, **changes)
    assert refusal(site, plan()) == "not_approved"
    assert decision.invalid(site) == [path] and decision.every(site) == []


def test_refusal_turned_into_an_approval_is_none(site: Site) -> None:
    approval.decide(site, plan(), "refused")
    (path,) = site.approvals.iterdir()
    forge(path, verdict="approved")
    assert refusal(site, plan()) == "not_approved"


def test_record_signed_with_another_key_or_for_another_plan_or_as_another_author_is_none(
    site: Site, tmp_path: Path
) -> None:
    other = write_site(tmp_path / "copy", num_patients=1, policies=[])
    approval.decide(other, plan(), "approved")
    (record,) = other.approvals.iterdir()
    site.approvals.mkdir()
    (site.approvals / record.name).write_bytes(record.read_bytes())
    keys.own(site.private / "site.key")
    assert refusal(site, plan()) == "not_approved"
    assert refusal(other, plan(seed=1)) == "not_approved"
    record.rename(record.with_name(f"{plan(seed=1).hash}.json"))
    assert refusal(other, plan(seed=1)) == "not_approved"


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"verdict": "approved"}'])
def test_file_that_holds_something_else_is_no_approval(site: Site, content: bytes) -> None:
    site.approvals.mkdir()
    (site.approvals / f"{plan().hash}.json").write_bytes(content)
    assert refusal(site, plan()) == "not_approved"


def test_seeded_noise_is_refused_whatever_was_approved(tmp_path: Path, site: Site) -> None:
    seeded = plan(randomness="seeded")
    approval.decide(site, seeded, "approved")
    assert refusal(site, seeded) == "seeded_noise"
    everything = write_site(tmp_path / "all", num_patients=1, policies=[EVERY_PLAN])
    assert refusal(everything, seeded) == "seeded_noise"


def test_seeded_noise_is_taken_where_the_unsafe_setting_allows_it(tmp_path: Path) -> None:
    site = write_site(tmp_path / "lab", num_patients=1, unsafe_allow_seeded_noise=True)
    approval.require(site, plan(randomness="seeded"))


def test_unsafe_setting_is_no_approval(tmp_path: Path) -> None:
    site = write_site(tmp_path / "lab", num_patients=1, unsafe_allow_seeded_noise=True, policies=[])
    assert refusal(site, plan(randomness="seeded")) == "not_approved"


def test_plan_without_privacy_is_refused_whatever_was_approved(tmp_path: Path) -> None:
    """There is no budget for it."""
    exact = plan(privacy="none")
    careful = write_site(tmp_path / "careful", num_patients=1, unsafe_allow_no_privacy=False)
    approval.decide(careful, exact, "approved")
    assert refusal(careful, exact) == "no_privacy"
    approval.require(careful, plan())
    with_public_data = write_site(
        tmp_path / "open", num_patients=1, role="evaluation", data="public", unsafe_allow_no_privacy=False
    )
    approval.require(with_public_data, exact)


def test_record_shows_the_plan_and_the_person_and_can_be_read_by_its_owner_only(site: Site) -> None:
    approval.decide(site, plan(), "approved")
    (path,) = site.approvals.iterdir()
    record = json.loads(path.read_text())
    assert (record["plan_hash"], record["by"], record["who"]) == (plan().hash, "person", account())
    assert Plan.from_tree(record["plan"]) == plan()
    assert site.approvals.stat().st_mode & 0o077 == 0 and path.stat().st_mode & 0o077 == 0


def test_rehearsal_decides_and_keeps_nothing_and_minds_rules_that_refuse(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", policies=[NEVER], max_epsilon=10.0)
    found = rehearsal.rehearse(site, plan(**TINY))
    assert (found.status, found.reason) == ("declined", "plan_refused")
    assert rehearsal.rehearse(with_policies(site), plan(**TINY)).status == "approved"
    assert not site.approvals.exists() and waiting.every(site) == []


def test_what_rules_decided_is_kept_for_a_bounded_number_of_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision, "MOST_BY_RULES", 3)
    site = write_site(tmp_path / "south", num_patients=1, policies=[EVERY_PLAN])
    approval.decide(site, plan(seed=99), "approved")
    for seed in range(5):
        approval.require(site, plan(seed=seed))
    assert {told.plan.seed for told in decision.every(site)} == {99, 2, 3, 4}
