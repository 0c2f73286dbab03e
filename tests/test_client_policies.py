from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from client import cost
from client.policies import EVERY_PLAN, MODELS, Conditions, Policy, first
from client.release import open_ledger
from tests.plans import plan
from tests.sites import write_site

AGE = {"name": "age", "kind": "number", "mean": 55.0, "std": 20.0}


def hold(plan_changes: dict[str, Any], **conditions: Any) -> bool:
    asked = plan(**plan_changes)
    return Conditions(**conditions).hold(asked, epsilon=lambda: asked.privacy.target_epsilon)


@pytest.mark.parametrize(
    ("conditions", "holds", "does_not"),
    [
        ({"studies": ["a", "b"]}, {"study": "b"}, {"study": "c"}),
        ({"models": ["cnn"]}, {}, {"model": "densenet121"}),
        ({"targets": ["class"]}, {}, {"target": "labels"}),
        ({"clinical": []}, {}, {"clinical": [AGE]}),
        ({"clinical": ["age", "sex"]}, {"clinical": [AGE]}, {"clinical": [{**AGE, "name": "weight"}]}),
        ({"max_rounds": 5}, {"rounds": 5}, {"rounds": 6}),
        ({"above_rounds": 5}, {"rounds": 6}, {"rounds": 5}),
        ({"max_epsilon": 0.5}, {"privacy__target_epsilon": 0.5}, {"privacy__target_epsilon": 0.51}),
        ({"above_epsilon": 0.5}, {"privacy__target_epsilon": 0.51}, {"privacy__target_epsilon": 0.5}),
        (
            {"studies": ["a"], "max_rounds": 5, "max_epsilon": 0.5},
            {"study": "a", "rounds": 5, "privacy__target_epsilon": 0.5},
            {"study": "a", "rounds": 5, "privacy__target_epsilon": 0.6},
        ),
    ],
)
def test_condition_holds_exactly_where_it_says(
    conditions: dict[str, Any], holds: dict[str, Any], does_not: dict[str, Any]
) -> None:
    assert hold(holds, **conditions)
    assert not hold(does_not, **conditions)
    assert hold(holds) and hold(does_not), "a condition that is left out holds for every plan"


def test_models_are_those_of_plans() -> None:
    assert {"cnn", "linear", "article_cnn", "densenet121", "efficientnet_b0", "unet"} == MODELS


@pytest.mark.parametrize(
    "conditions",
    [
        {"models": ["cnnn"]},
        {"model": ["cnn"]},
        {"studies": []},
        {"studies": ["Chest Demo"]},
        {"targets": ["classes"]},
        {"max_epsilon": math.inf},
        {"max_epsilon": 1.0, "above_epsilon": 1.0},
        {"max_rounds": 3, "above_rounds": 3},
    ],
)
def test_condition_that_can_never_hold_or_is_misspelt_is_refused(conditions: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Conditions(**conditions)


def test_first_rule_of_a_kind_decides() -> None:
    rules = [
        Policy(name="small", decision="approve", when=Conditions(max_rounds=5)),
        Policy(name="large", decision="refuse", when=Conditions(above_rounds=50)),
        EVERY_PLAN,
    ]

    def chosen(kind: Any, rounds: int) -> str | None:
        found = first(rules, kind, plan(rounds=rounds), epsilon=lambda: 0.0)
        return None if found is None else found.name

    assert [chosen("approve", rounds) for rounds in (5, 6, 51)] == ["small", "every plan", "every plan"]
    assert [chosen("refuse", rounds) for rounds in (5, 51)] == [None, "large"]


def test_epsilon_of_a_rule_is_what_the_ledger_would_be_charged_alone(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=60)
    asked = plan(privacy__target_epsilon=0.5)
    with open_ledger(site) as ledger:
        alone, _ = ledger.projected(cost.planned_spends(site, asked))
    assert cost.run_epsilon(site, asked) == alone.value <= 0.5


def test_nothing_bounds_what_exact_or_seeded_or_unreachable_plans_tell(tmp_path: Path) -> None:
    site = write_site(tmp_path / "north", num_patients=60)
    unreachable = plan(privacy__target_epsilon=0.01, privacy__max_noise_multiplier=1.0)
    for asked in (plan(privacy="none"), plan(randomness="seeded"), unreachable):
        assert cost.run_epsilon(site, asked) == math.inf
    open_data = write_site(tmp_path / "open", num_patients=60, role="evaluation", data="public")
    assert cost.run_epsilon(open_data, plan(privacy="none")) == 0.0
