from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from common import config
from common.errors import ConfigError
from common.plan import Plan

NEEDED = ["plan.classes=[normal,opacity]", "plan.sites=4"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.compose_plan([*NEEDED, *overrides])
    return str(caught.value)


def test_composed_plan_has_the_defaults_and_the_overrides() -> None:
    composed = config.compose_plan([*NEEDED, "plan.rounds=7", "training.momentum=0.9", "model=densenet121"])
    assert isinstance(composed, Plan)
    assert composed.classes == ("normal", "opacity")
    assert (composed.rounds, composed.sites) == (7, 4)
    assert composed.training.momentum == 0.9
    assert composed.model.name == "densenet121"
    assert composed.privacy.mechanism == "dp_sgd"


def test_same_overrides_give_the_same_hash_every_time() -> None:
    first = config.compose_plan(NEEDED)
    assert config.compose_plan(NEEDED).hash == first.hash
    assert config.compose_plan([*NEEDED, "plan.seed=1"]).hash != first.hash


@pytest.mark.parametrize("group", ["model", "preprocessing", "privacy", "training"])
def test_every_file_of_a_group_composes(group: str) -> None:
    from importlib.resources import files

    names = [entry.name.removesuffix(".yaml") for entry in files("conf").joinpath(group).iterdir()]
    chosen = [name for name in names if name != "__pycache__"]
    assert len(chosen) >= 2
    for name in chosen:
        extra = {"article_cnn": ["preprocessing=rgb64"], "unet": ["plan.target=mask"]}.get(name, [])
        assert config.compose_plan([*NEEDED, f"{group}={name}", *extra]).hash


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("plan.colour=red", "plan.colour"),
        ("training.bach=3", "training.bach"),
        ("nothing=1", "nothing"),
        ("model=resnet", "model/resnet"),
        ("+plan.colour=red", "'colour'"),
        ("+training.bach=3", "'training.bach'"),
        ("plan.rounds=0", "rounds"),
        ("plan.rounds=many", "rounds"),
        ("plan.rounds=1.5", "rounds"),
        ("plan.rounds=null", "rounds"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("privacy.target_epsilon=-1", "target_epsilon"),
        ("plan.quorum=5", "quorum <= sites"),
        ("strategy.weights=examples", "strategy.weights=examples"),
        ("plan.rounds=[1", "plan.rounds"),
        ("plan.rounds=${nowhere}", "nowhere"),
        ("rounds", "rounds"),
        ("~training", "the group training"),
        ("~plan.seed", "seed"),
    ],
)
def test_wrong_override_is_refused_in_one_line_that_names_the_key(override: str, named: str) -> None:
    message = refusal(override)
    assert named in message
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("missing", ["plan.classes", "plan.sites"])
def test_missing_mandatory_value_is_named(missing: str) -> None:
    given = [text for text in NEEDED if not text.startswith(missing)]
    with pytest.raises(ConfigError) as caught:
        config.compose_plan(given)
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_becomes_plain_values_with_interpolations_resolved() -> None:
    tree = config.plain(OmegaConf.create({"a": {"b": 3}, "c": ["${a.b}", "x"]}))
    assert tree == {"a": {"b": 3}, "c": [3, "x"]}
    assert type(tree["a"]) is dict
    assert type(tree["c"]) is list


@pytest.mark.parametrize(("value", "named"), [("???", "a"), ("${nowhere}", "nowhere")])
def test_value_that_leads_nowhere_is_refused(value: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        config.plain(OmegaConf.create({"a": value}))
    assert "\n" not in str(caught.value)


def test_plan_takes_its_groups_and_nothing_else_of_a_tree() -> None:
    """The simulation's config has groups of its own, which are no part of the plan."""
    tree: dict[str, Any] = {name: {} for name in config.GROUPS}
    with pytest.raises(ConfigError):
        config.plan_of({"plan": {}, **tree})
    composed = config.compose_plan(NEEDED)
    parts = {name: composed.model_dump()[name] for name in config.GROUPS}
    own = {
        name: value
        for name, value in composed.model_dump().items()
        if name not in parts and name != "schema_version"
    }
    assert config.plan_of({"plan": own, **parts, "engine": {"name": "local"}}) == composed


def test_other_errors_are_not_taken_for_wrong_settings() -> None:
    def defect() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        config.explained(defect)
