from __future__ import annotations

from pathlib import Path

import pytest

from client import approval, difference, rehearsal
from client.proposal import last_approved, proposal, sections
from client.site import Site
from tests import plans
from tests.plans import TINY, plan
from tests.sites import write_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    budgets = [{"study": "chest-demo", "max_epsilon": 2.0}]
    return write_site(tmp_path / "north", policies=[], max_epsilon=5.0, study_budgets=budgets)


def test_every_key_of_a_plan_is_shown_with_its_value() -> None:
    for asked in (plan(), plan(privacy="none"), plan(model="article_cnn", preprocessing="rgb64")):
        shown = [row for rows in sections(asked).values() for row in rows.items()]
        assert len(shown) == len(difference.leaves(asked)) + 1
        assert dict(difference.leaves(asked)).items() <= dict(shown).items()


def test_what_is_asked_for_stands_under_its_heading() -> None:
    asked = plan(rounds=3, training__local_steps=4)
    found = sections(asked)
    assert found["Data"]["classes"] == ["normal", "opacity"] and found["Data"]["target"] == "class"
    steps = [value for key, value in found["Preprocessing, steps in this order"].items() if "name" in key]
    assert steps == [step.name for step in asked.preprocessing.steps]
    assert found["Rounds and steps"]["steps of one site in the whole run"] == 12
    assert "approval_deadline_seconds" in found["Deadlines"] and "rounds" not in found["Deadlines"]


def test_cost_is_that_of_a_rehearsal_with_what_will_be_left(site: Site) -> None:
    asked = plan(**TINY, privacy__target_epsilon=1.5)
    cost, rehearsed = proposal(site, asked).cost, rehearsal.rehearse(site, asked)
    assert (cost.epsilon, cost.total_epsilon) == (rehearsed.run_epsilon, rehearsed.total_epsilon)
    assert cost.epsilon is not None and cost.problem == ""
    assert (cost.left, cost.study_left) == (5.0 - cost.epsilon, 2.0 - cost.epsilon)


def test_plan_that_cannot_be_paid_says_so(site: Site) -> None:
    assert "budget" in proposal(site, plan(privacy__target_epsilon=2.5)).cost.problem
    unreachable = plan(privacy__target_epsilon=0.01, privacy__max_noise_multiplier=1.0)
    assert "no noise multiplier" in proposal(site, unreachable).cost.problem


def test_plan_without_privacy_has_no_bound_and_what_the_site_never_does_is_named(tmp_path: Path) -> None:
    strict = write_site(tmp_path / "strict", policies=[], unsafe_allow_no_privacy=False)
    found = proposal(strict, plan(privacy="none"))
    assert (found.cost.epsilon, found.cost.left) == (None, None)
    assert found.obstacle == "no_privacy"
    assert proposal(strict, plan()).obstacle == ""
    never = {"name": "never", "decision": "refuse", "when": {}}
    assert proposal(write_site(tmp_path / "shut", policies=[never]), plan()).obstacle == "plan_refused"


def test_difference_names_changed_keys_with_old_and_new_values(site: Site) -> None:
    old, new = plan(), plan(rounds=7, preprocessing="grey28")
    approval.decide(site, old, "approved")
    found = proposal(site, new)
    assert found.compared_with == old.hash
    changed = {one.key: (one.old, one.new) for one in found.changes}
    assert changed == {"rounds": (25, 7), "preprocessing.size": ([32, 32], [28, 28])}
    assert proposal(site, old).changes == (), "a plan is not compared with itself"


def test_keys_that_one_plan_lacks_are_absent_there() -> None:
    changed = {one.key: (one.old, one.new) for one in difference.changes(plan(), plan(privacy="none"))}
    assert changed["privacy.mechanism"] == ("dp_sgd", "none")
    assert changed["privacy.target_epsilon"] == (3.0, difference.ABSENT)


def test_last_plan_of_the_study_is_compared_first_else_of_any(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, same = plan(study="other"), plan(seed=1)
    assert last_approved(site, plan()) is None
    approval.decide(site, plan(seed=9), "refused")
    assert last_approved(site, plan()) is None, "a refused plan is nothing to compare with"
    approval.decide(site, other, "approved")
    assert last_approved(site, plan()) == other
    approval.decide(site, same, "approved")
    assert last_approved(site, plan()) == same
    assert last_approved(site, plan(study="third")) in (other, same)


QUICK = {"preprocessing": "grey28", "training__local_steps": 1, "training__expected_batch": 4}
MASKS = {**QUICK, "target": "mask", "classes": ("background", "square"), "model": "unet"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["classes", "masks", "public"])
def test_what_is_said_to_leave_is_what_a_rehearsal_sends(tmp_path: Path, kind: str, exact: bool) -> None:
    asked = plans.plan(**(MASKS if kind == "masks" else QUICK), **({"privacy": "none"} if exact else {}))
    if kind == "public":
        split = {"train": 0.0, "validation": 0.0, "test": 1.0}
        site = write_site(tmp_path / "north", role="evaluation", data="public", split=split)
    else:
        site = write_site(tmp_path / "north", masks=kind == "masks")
    with_ledger = proposal(site, asked)  # opens a ledger, so that its head is sent in every case
    sent = {(one.message.partition(" ")[0], one.field) for one in rehearsal.rehearse(site, asked).fields}
    said = {(one.message, one.field) for one in with_ledger.leaves if one.message not in ("refused", "error")}
    assert sent == said
