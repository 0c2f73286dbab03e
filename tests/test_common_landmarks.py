from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common import landmarks
from common.calibration import landmark_noise_std, noise_multiplier, run_spends
from common.config import compose_plan
from common.errors import ConfigError
from common.plan import Plan
from common.privacy import epsilon
from common.steps import Landmarks
from tests.plans import plan

ASKED: dict[str, Any] = {
    "landmarks": {"percentiles": [25, 50, 75], "bins": 20},
    "rounds": 1,
    "evaluation__validation_every": 0,
    "evaluation__test_at_end": False,
}
WEIRD = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)


def test_landmarks_are_asked_of_every_site() -> None:
    with pytest.raises(ConfigError, match="asks every site once"):
        asking(sites=4, sites_per_round=2)


def asking(**changes: Any) -> Plan:
    return plan(**(ASKED | changes))


@given(
    patients=arrays.arrays(np.float64, st.tuples(st.integers(1, 8), st.just(3)), elements=WEIRD),
    bins=st.integers(4, 40),
    leaves=st.integers(0, 7),
)
def test_one_patient_moves_all_histograms_by_exactly_the_sensitivity(
    patients: np.ndarray, bins: int, leaves: int
) -> None:
    """Whatever the values are: added or removed, a patient counts once in each histogram."""
    fewer = np.delete(patients, leaves % len(patients), axis=0)
    moved = landmarks.histograms(patients, bins=bins) - landmarks.histograms(fewer, bins=bins)
    assert np.linalg.norm(moved) == pytest.approx(landmarks.l2_sensitivity(3), abs=1e-12)


@given(
    patients=arrays.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(4)), elements=st.floats(0, 1)),
    noise=st.integers(0, 2**32 - 1),
    std=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_values_are_always_a_map_that_a_plan_accepts(patients: np.ndarray, noise: int, std: float) -> None:
    counts = landmarks.histograms(np.sort(patients, axis=1), bins=20)
    counts += std * np.random.default_rng(noise).normal(size=counts.shape)
    found = landmarks.values(counts)
    step = Landmarks(name="landmarks", percentiles=(1, 10, 30, 60, 90, 99), values=(0.0, *found, 1.0))
    assert step.values[1:-1] == found


def test_equal_medians_are_set_apart_also_halfway_between_two_values() -> None:
    for place in range(0, 1000, 7):  # the median is the middle of this bin: 0.0005, 0.0075, ...
        counts = np.zeros((3, 1000))
        counts[:, place] = 1.0
        found = landmarks.values(counts)
        assert np.all(np.diff([0.0, *found, 1.0]) > 0), (place, found)


def test_values_are_the_medians_over_patients_within_a_bin() -> None:
    patients = np.sort(np.random.default_rng(0).beta(2, 3, (501, 5)), axis=1)
    found = landmarks.values(landmarks.histograms(patients, bins=40))
    np.testing.assert_allclose(found, np.median(patients, axis=0), atol=1 / 40)


def test_uncertainty_is_what_noise_does_to_the_place_of_a_median() -> None:
    rng = np.random.default_rng(1)
    counts = np.full((1, 20), 50.0)  # uniform, so a place in patients is a place in [0, 1]
    std = 20.0
    found = [landmarks.values(counts + std * rng.normal(size=counts.shape))[0] for _ in range(2000)]
    assert np.std(found) == pytest.approx(landmarks.uncertainty(counts, noise_std=std), rel=0.15)
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)
    assert landmarks.uncertainty(-counts, noise_std=std) == float("inf")


def test_landmarks_cost_the_target_once_and_nothing_else() -> None:
    asked = asking(privacy__target_epsilon=1.5)
    spends = run_spends(asked, nominal_patients=70, parts=("train", "validation", "test"))
    assert spends["validation"] == spends["test"] == ()
    (spend,) = spends["train"]
    assert (spend.sample_rate, spend.steps) == (1.0, 1)
    assert 1.485 <= epsilon([spend], delta=1e-4).value <= 1.5
    wanted = noise_multiplier(target_epsilon=1.5, delta=1e-4, sample_rate=1.0, steps=1)
    assert landmark_noise_std(asked, nominal_patients=70) == pytest.approx(wanted * 3**0.5)


def test_the_group_asks_for_landmarks_of_the_usual_plan() -> None:
    asked = compose_plan(["plan=landmarks", "plan.classes=[a,b]", "plan.sites=3"])
    assert asked.landmarks is not None and asked.rounds == 1 and not asked.evaluation.test_at_end
    assert compose_plan(["plan.classes=[a,b]", "plan.sites=3"]).landmarks is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 2}, "one round"),
        ({"evaluation__test_at_end": True}, "evaluates nothing"),
        ({"landmarks": {"percentiles": [50, 25], "bins": 20}}, "increase"),
        ({"landmarks": {"percentiles": [0.5, 25], "bins": 20}}, "between those of the step percentile"),
        ({"landmarks": {"percentiles": [25, 99], "bins": 20}}, "between those of the step percentile"),
        ({"landmarks": {"percentiles": [25], "bins": 2}}, "bins"),
        ({"preprocessing__steps": [{"name": "z_score", "limit": 3}, {"name": "resize"}]}, "found z_score"),
    ],
)
def test_landmarks_that_cannot_be_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        asking(**changes)


LONG = [
    {"name": "resample", "spacing_mm": [1, 1]},
    {"name": "percentile", "lower": 1, "upper": 99},
    {"name": "gamma", "gamma": 2},
    {"name": "pad_or_crop"},
]


def test_a_case_is_measured_after_the_scaling_and_before_what_follows() -> None:
    asked = asking(preprocessing__steps=LONG)
    assert [step.name for step in asked.asked.preprocessing.steps] == ["resample", "percentile", "resize"]
    training = plan(preprocessing__steps=LONG)
    assert training.asked.preprocessing == training.preprocessing


def test_the_later_plan_has_landmarks_in_the_place_of_percentile() -> None:
    asked = asking(preprocessing__steps=LONG)
    assert asked.landmarks is not None
    steps = landmarks.harmonised(asked.preprocessing, asked=asked.landmarks, values=(0.2, 0.5, 0.7))
    found = [step.model_dump(mode="json") for step in steps]
    assert found[1] == {
        "name": "landmarks",
        "percentiles": [1.0, 25.0, 50.0, 75.0, 99.0],
        "values": [0.0, 0.2, 0.5, 0.7, 1.0],
    }
    assert found[:1] + found[2:] == [
        step.model_dump(mode="json") for step in asked.preprocessing.steps if step.name != "percentile"
    ]
