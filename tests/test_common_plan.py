from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common import plan as plans
from common.errors import ConfigError, SchemaError
from common.plan import SCHEMA_VERSION, Plan
from common.value import Value, canonical_json
from tests.plans import plan

FULL = {"name": "percentile", "lower": 0, "upper": 100}
CROP = {"name": "crop_foreground", "above": 0, "margin_pixels": 0}
AGE = {"name": "age", "kind": "number", "mean": 50, "std": 20}

STILL = {
    "copies": 4,
    "max_shift_fraction": 0,
    "max_rotation_degrees": 0,
    "max_zoom_fraction": 0,
    "flip_axes": [],
    "max_gamma": 1,
    "max_noise_std": 0,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Returns the tree of a plan with one value set, whether the plan takes it or not."""
    tree = plan().model_dump(mode="json")
    *parents, key = path.split(".")
    place = tree
    for part in parents:
        place = place[part]
    place[key] = value
    return tree


def refusal(tree: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Plan.from_tree(tree)
    return str(caught.value)


def test_json_is_read_back_as_the_same_plan() -> None:
    original = plan()
    again = Plan.from_json(original.to_json())
    assert again == original
    assert again.to_json() == original.to_json()
    assert again.hash == original.hash


def test_hash_is_sha256_of_the_canonical_json() -> None:
    text = plan().to_json()
    assert plan().hash == hashlib.sha256(text.encode()).hexdigest()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_the_hash_of_a_changed_copy_is_that_of_its_own_content() -> None:
    original = plan()
    assert original.hash == plan().hash  # it is kept from now on
    for deep in (False, True):
        changed = original.model_copy(update={"study": "b"}, deep=deep)
        assert (changed.hash, changed.to_json()) == (plan(study="b").hash, plan(study="b").to_json())
        assert changed != original and original.model_copy(deep=deep) == original == plan()


def test_order_of_keys_and_kind_of_number_do_not_change_the_hash() -> None:
    tree = plan().model_dump(mode="json")
    backwards = dict(reversed(tree.items()))
    backwards["reply_deadline_seconds"] = 600
    assert Plan.from_tree(backwards).hash == plan().hash


def test_every_changed_value_changes_the_hash() -> None:
    hashes = {plan().hash, plan(seed=1).hash, plan(training__learning_rate=0.25).hash, plan(study="b").hash}
    assert len(hashes) == 4


JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON_TREES)
def test_canonical_json_is_ascii_and_reads_back(tree: Any) -> None:
    text = canonical_json(tree)
    assert text.isascii()
    assert json.loads(text) == tree
    assert canonical_json(json.loads(text)) == text


def steps(*before: dict[str, Any]) -> list[dict[str, Any]]:
    return [*before, {"name": "resize"}]


def landmarks(percentiles: list[float], values: list[float]) -> dict[str, Any]:
    return {"name": "landmarks", "percentiles": percentiles, "values": values}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_numbers_that_json_does_not_have(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": number})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rounds", 0),
        ("rounds", "many"),
        ("rounds", 2.5),
        ("rounds", None),
        ("seed", -1),
        ("seed", 2**32),
        ("study", "Not A Name"),
        ("study", "../up"),
        ("randomness", "maybe"),
        ("classes", ["only"]),
        ("classes", "normal"),
        ("sites", 0),
        ("quorum", 0),
        ("reply_deadline_seconds", 0),
        ("reply_deadline_seconds", math.inf),
        ("reply_deadline_seconds", math.nan),
        ("node_deadline_seconds", 31 * 86400),
        ("grace_seconds", -1),
        ("preprocessing.channels", 2),
        ("preprocessing.size", [8, 8, 8, 8]),
        ("preprocessing.precision", "float64"),
        ("preprocessing.inputs", []),
        ("target", "anything"),
        ("clinical", 3),
        ("preprocessing", 101),
        ("training.local_steps", -1),
        ("training.expected_batch", 0),
        ("training.cases_per_patient", 0),
        ("training.physical_batch", 0),
        ("training.learning_rate", 0),
        ("training.learning_rate", math.nan),
        ("training.learning_rate", math.inf),
        ("training.momentum", 1),
        ("training.weight_decay", -0.1),
        ("training.weight_decay", math.inf),
        ("training.proximal_mu", math.nan),
        ("training.augmentation", 4),
        ("evaluation.bins", 1),
        ("evaluation.validation_every", -1),
        ("evaluation.noise_multiplier", 0),
        ("evaluation.noise_multiplier", math.nan),
    ],
)
def test_value_out_of_range_is_refused_in_one_line_that_names_the_key(path: str, value: Any) -> None:
    message = refusal(changed(path, value))
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (4, "schema 3 at most, found 4: a newer Feverfew wrote it; update this one"),
        (1, "schema 3, found 1: an older Feverfew made it; compose it again with feverfew-server plan"),
        (None, "with a schema version, found None"),
        ("2", "with a schema version, found '2'"),
        (True, "with a schema version, found True"),
    ],
)
def test_plan_of_another_schema_is_refused_by_its_age(found: Any, told: str) -> None:
    """Whatever else it holds."""
    with pytest.raises(SchemaError) as caught:
        Plan.from_json(json.dumps({"schema_version": found, "from_another_time": 1}))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_plan_of_this_schema_keeps_its_keys_and_its_hash() -> None:
    """If this fails, a key came or went: raise SCHEMA_VERSION, and write the file anew under its number."""
    text = (Path(__file__).parent / "former" / f"plan-{SCHEMA_VERSION}.json").read_text(encoding="utf-8")
    assert Plan.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("privacy.dp_sgd.target_epsilon", 0),
        ("privacy.dp_sgd.target_epsilon", math.nan),
        ("privacy.dp_sgd.target_epsilon", math.inf),
        ("privacy.dp_sgd.delta", 0),
        ("privacy.dp_sgd.delta", 0.1),
        ("privacy.dp_sgd.max_grad_norm", 0),
        ("privacy.dp_sgd.max_grad_norm", math.inf),
        ("privacy.dp_sgd.loss_bound", math.nan),
        ("privacy.dp_sgd.loss_noise_ratio", 0.5),
        ("model.cnn.groups", 0),
        ("model.cnn.channels.0", 0),
        ("strategy.fedavg.weights", "by size"),
        ("strategy.fedavg.server_learning_rate", 0),
        ("strategy.fedavg.server_momentum", 1.0),
        ("strategy.fedavg.update_bound", math.inf),
        ("strategy.fedavg.update_bound", 1025),
    ],
)
def test_value_of_a_chosen_kind_is_refused_under_its_key(path: str, value: Any) -> None:
    tree = plan().model_dump(mode="json")
    group, _, key, *index = path.split(".")
    if index:
        tree[group][key][0] = value
    else:
        tree[group][key] = value
    message = refusal(tree)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("path", ["colour", "training.batch", "evaluation.metric"])
def test_unknown_key_is_refused_by_name(path: str) -> None:
    assert refusal(changed(path, 1)) == f"Unknown key '{path}'; see conf/ for the keys that exist."


@pytest.mark.parametrize("path", ["seed", "training.momentum", "evaluation.noise_multiplier"])
def test_missing_key_is_refused_by_name(path: str) -> None:
    tree = changed(path, None)
    *parents, key = path.split(".")
    place = tree
    for part in parents:
        place = place[part]
    del place[key]
    assert refusal(tree).startswith(f"{path}: field required")


def test_strategy_that_does_not_exist_and_keys_that_it_does_not_have_are_refused() -> None:
    assert refusal(changed("strategy.name", "other")).startswith("strategy: input tag 'other'")
    unknown = refusal(changed("strategy.momentum", 1))
    assert unknown == "Unknown key 'strategy.fedavg.momentum'; see conf/ for the keys that exist."
    tree = plan().model_dump(mode="json")
    del tree["strategy"]["weights"]
    assert refusal(tree).startswith("strategy.fedavg.weights: field required")


def test_several_problems_are_counted() -> None:
    tree = changed("rounds", 0) | {"quorum": 0}
    assert refusal(tree) == "rounds: input should be greater than or equal to 1, found 0 (and 1 more)."


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quorum": 3}, "quorum <= sites"),
        ({"classes": ("a", "a")}, "distinct classes"),
        ({"strategy__weights": "examples"}, "strategy.weights=examples"),
        ({"privacy": "none", "evaluation__noise_multiplier": 1.0}, "evaluation.noise_multiplier"),
        (
            {
                "evaluation__validation_every": 0,
                "evaluation__test_at_end": False,
                "evaluation__noise_multiplier": 2.0,
            },
            "evaluation.noise_multiplier has no effect where nothing is evaluated",
        ),
        ({"privacy__noise": "shared"}, "noise=shared is refused: a site's part of the noise protects nobody"),
        ({"model": "article_cnn"}, "preprocessing.channels=3 preprocessing.size=[64,64]"),
        (
            {"model": "article_cnn", "preprocessing": "rgb64", "preprocessing__size": (28, 28)},
            "preprocessing.size=[64,64]",
        ),
        ({"model": "article_cnn", "preprocessing": "rgb64", "classes": ("a", "b", "c")}, "two classes"),
        ({"privacy__noise_multiplier": 1.0}, "exactly one of target_epsilon and noise_multiplier"),
        ({"privacy__target_epsilon": None}, "exactly one of target_epsilon and noise_multiplier"),
        ({"model__channels": (12, 16)}, "divisible by groups=16"),
        ({"model__channels": (16, 32, 64)}, "one pool size for each of channels"),
        ({"preprocessing__steps": steps({"name": "percentile", "lower": 99, "upper": 99})}, "lower < upper"),
        ({"preprocessing__steps": steps({"name": "window", "lower": 1, "upper": 0})}, "lower < upper"),
        ({"preprocessing__steps": steps()}, "one step that scales to [0, 1], found 0"),
        ({"preprocessing__steps": steps(FULL, FULL)}, "one step that scales to [0, 1], found 2"),
        ({"preprocessing__steps": [FULL]}, "one step resize or pad_or_crop, found 0"),
        ({"preprocessing__steps": steps(FULL, {"name": "resize"})}, "resize or pad_or_crop, found 2"),
        ({"preprocessing__steps": steps({"name": "gamma", "gamma": 2}, FULL)}, "gamma after the scaling"),
        (
            {"preprocessing__steps": steps(FULL, {"name": "resample", "spacing_mm": [1, 1, 1]})},
            "expected 2 spacings",
        ),
        (
            {
                "preprocessing__steps": [
                    *steps(FULL),
                    {"name": "crop_foreground", "above": 0, "margin_pixels": 0},
                ]
            },
            "expected resize after all other steps that change the size",
        ),
        ({"preprocessing__steps": steps(landmarks([1, 50], [0, 0.5, 1]))}, "as many values as percentiles"),
        ({"preprocessing__steps": steps(landmarks([1, 99], [1, 0]))}, "percentiles and values that increase"),
        ({"preprocessing__inputs": ["t1", "t1"]}, "distinct inputs"),
        ({"preprocessing__size": [1024, 1024, 1024]}, "values in a case"),
        ({"clinical": [AGE, AGE]}, "distinct clinical values"),
        ({"clinical": [AGE | {"std": 0}]}, "std"),
        ({"privacy__clipping": "ghost"}, "training.cases_per_patient=1"),
        (
            {
                "privacy__clipping": "ghost",
                "training__cases_per_patient": 1,
                "training__augmentation": STILL | {"max_shift_fraction": 0.1},
            },
            "no augmentation",
        ),
        ({"privacy__clipping": "ew", "model": "densenet121"}, "clipping=ew cannot train model=densenet121"),
        ({"training__augmentation": STILL}, "set augmentation to null"),
        ({"training__augmentation": STILL | {"copies": 0, "flip_axes": [1]}}, "training.augmentation.copies"),
        ({"training__augmentation": STILL | {"max_shift_fraction": 0.6}}, "augmentation.max_shift_fraction"),
        ({"training__augmentation": STILL | {"max_zoom_fraction": math.nan}}, "augmentation.max_zoom"),
        ({"training__augmentation": STILL | {"max_rotation_degrees": -1}}, "augmentation.max_rotation"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exact_weights_are_taken_without_privacy() -> None:
    assert plan(privacy="none", strategy__weights="examples").strategy.weights == "examples"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", "1", '"plan"'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_with_a_number_that_is_not_finite_is_refused(constant: str) -> None:
    text = plan(training__learning_rate=0.25).to_json()
    text = text.replace('"learning_rate":0.25', f'"learning_rate":{constant}')
    assert constant in text
    with pytest.raises(ConfigError, match=r"^training\.learning_rate: "):
        Plan.from_json(text)


def test_plan_cannot_be_changed() -> None:
    frozen = plan()
    with pytest.raises(ValueError, match="frozen"):
        frozen.rounds = 5
    with pytest.raises(ValueError, match="frozen"):
        frozen.training.local_steps = 5


def parts_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Returns a model and all models that its fields are made of."""
    found = {model}
    waiting = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, Value):
            found |= parts_of(kind)
    return found


@pytest.mark.parametrize("model", sorted(parts_of(plans.Plan), key=str), ids=lambda model: model.__name__)
def test_no_field_of_a_plan_has_a_default(model: type[BaseModel]) -> None:
    assert model.model_fields
    assert [name for name, field in model.model_fields.items() if not field.is_required()] == []


def test_defaults_of_every_part_of_the_plan_are_looked_for() -> None:
    found = {model.__name__ for model in parts_of(plans.Plan)}
    assert found >= {"Cnn", "DpSgd", "NoPrivacy", "Augmentation", "FedAvg", "Median", "Number", "Category"}


@pytest.mark.parametrize(
    ("rounds", "every", "expected"),
    [(6, 2, (2, 4, 6)), (5, 2, (2, 4)), (4, 4, (4,)), (4, 1, (1, 2, 3, 4)), (5, 0, ())],
)
def test_validation_follows_every_so_many_rounds(rounds: int, every: int, expected: tuple[int, ...]) -> None:
    assert plan(rounds=rounds, evaluation__validation_every=every).validation_rounds == expected


def test_steps_are_counted_over_all_rounds() -> None:
    assert plan(rounds=7, training__local_steps=3).num_steps == 21


@pytest.mark.parametrize(("classes", "outputs"), [(("a", "b"), 1), (("a", "b", "c"), 3)])
def test_two_classes_have_one_output_and_more_have_one_each(classes: tuple[str, ...], outputs: int) -> None:
    assert plan(classes=classes).num_outputs == outputs
