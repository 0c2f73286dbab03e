from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common import dice
from common.dice import DiceScores, DiceSums, l2_sensitivity

FRACTION = st.floats(0, 1)


def scores(*patients: tuple[float, ...]) -> DiceScores:
    return DiceScores(dice=np.array(patients))


def drawn(rng: np.random.Generator, *, patients: int, classes: int = 2, mean: float = 0.8) -> DiceScores:
    """Patients of which each has good or bad Dice in all classes together."""
    own = rng.beta(20 * mean, 20 * (1 - mean), (patients, 1))
    return DiceScores(dice=np.clip(own + rng.normal(0, 0.02, (patients, classes)), 0, 1))


# --- statistics ---------------------------------------------------------------------------------------------


def test_sums_are_those_of_the_distances_from_a_half_and_of_the_patients() -> None:
    found = scores((0.9, 0.25), (1.0, 0.5), (0.5, 0.0)).sums()
    np.testing.assert_allclose(found.sums, [0.9, -0.75, 3.0])
    assert (found.num_classes, found.num_patients) == (2, 3)


def test_means_are_those_of_the_patients_by_class_and_over_all_classes() -> None:
    exact = scores((0.9, 0.25), (1.0, 0.5), (0.5, 0.0))
    for statistic in (exact, exact.sums()):
        assert dice.by_class(statistic) == pytest.approx((0.8, 0.25))
        assert dice.mean(statistic) == pytest.approx(0.525)


def test_merging_two_sites_is_as_if_their_patients_were_at_one() -> None:
    first, second = scores((0.9, 0.2), (0.4, 0.6)), scores((0.1, 1.0))
    together = scores((0.9, 0.2), (0.4, 0.6), (0.1, 1.0))
    for merged in (
        dice.merge([first, second]),
        dice.merge([first.sums(), second.sums()]),
        dice.merge([first, second.sums()]),
    ):
        assert dice.by_class(merged) == pytest.approx(dice.by_class(together))
    assert isinstance(dice.merge([first, second]), DiceScores)
    assert isinstance(dice.merge([first.sums(), second]), DiceSums)


def test_nobody_has_no_dice_and_no_interval() -> None:
    nobody = DiceScores(dice=np.zeros((0, 2)))
    for statistic in (nobody, nobody.sums(), DiceSums(sums=np.array([0.3, 0.2, -1.0]))):
        assert dice.by_class(statistic) is None
        assert dice.mean(statistic) is None
        assert dice.interval(statistic) is None


def test_means_of_noised_sums_stay_in_their_range() -> None:
    assert dice.by_class(DiceSums(sums=np.array([9.0, -9.0, 3.0]))) == (1.0, 0.0)
    assert dice.mean(DiceSums(sums=np.array([9.0, 9.0, 3.0]))) == 1.0


@pytest.mark.parametrize("wrong", [[[0.5, 1.1]], [[0.5, -0.1]], [[0.5, math.nan]], [0.5, 0.5]])
def test_scores_that_are_no_dice_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="expected dice"):
        DiceScores(dice=np.array(wrong))


@pytest.mark.parametrize("wrong", [[1.0], [[1.0, 2.0]], [0.5, math.inf]])
def test_sums_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="expected .*sums"):
        DiceSums(sums=np.array(wrong))


def test_statistics_of_different_tasks_do_not_merge() -> None:
    one, two = scores((0.5,)), scores((0.5, 0.5))
    with pytest.raises(ValueError, match="of 1 classes, found 2"):
        dice.merge([one, two])
    with pytest.raises(ValueError, match="of 2 classes, found 1"):
        dice.merge([two.sums(), one.sums()])
    with pytest.raises(ValueError, match="at least one"):
        dice.merge([])


# --- sensitivity --------------------------------------------------------------------------------------------


@given(st.integers(1, 5).flatmap(lambda classes: st.lists(FRACTION, min_size=classes, max_size=classes)))
def test_one_patient_moves_the_sums_by_the_sensitivity_at_most(own: list[float]) -> None:
    moved = scores(tuple(own)).sums().sums
    assert np.linalg.norm(moved) <= l2_sensitivity(len(own)) * (1 + 1e-12)


def test_sensitivity_is_reached_by_a_patient_whose_masks_are_all_right_or_all_wrong() -> None:
    for classes in (1, 2, 7):
        for value in (0.0, 1.0):
            moved = np.linalg.norm(scores((value,) * classes).sums().sums)
            assert moved == pytest.approx(l2_sensitivity(classes))
            assert moved == pytest.approx(math.sqrt(classes / 4 + 1))


def test_no_class_beside_the_background_has_no_sensitivity() -> None:
    with pytest.raises(ValueError, match="at least 1 class"):
        l2_sensitivity(0)


# --- intervals ----------------------------------------------------------------------------------------------


def kept_on_a_grid(sums: DiceSums, *, noise_std: float) -> np.ndarray:
    """The values whose distance is within the quantile of its own standard deviation, one by one."""
    shifts = np.linspace(-0.5, 0.5, 100_001)
    number, variance = sums.num_patients, noise_std**2
    distance = sums.sums[:-1].mean() - shifts * number
    spread = number * (0.25 - shifts**2) + variance / sums.num_classes + shifts**2 * variance
    return shifts[distance**2 <= NormalDist().inv_cdf(0.975) ** 2 * spread] + 0.5


@pytest.mark.parametrize("patients", [1, 5, 65, 1000])
@pytest.mark.parametrize("noise_std", [0.0, 0.5, 1.4, 5.0])
def test_interval_of_sums_holds_the_values_that_the_condition_keeps(patients: int, noise_std: float) -> None:
    rng = np.random.default_rng(patients)
    for mean in (0.1, 0.6, 0.9):
        sums = drawn(rng, patients=patients, mean=mean).sums()
        kept = kept_on_a_grid(sums, noise_std=noise_std)
        low, high = dice.interval(sums, noise_std=noise_std)
        assert low == pytest.approx(kept.min(), abs=2e-5)
        assert high == pytest.approx(kept.max(), abs=2e-5)


def test_student_quantile_is_that_of_scipy() -> None:
    for degrees, error in ((2, 1e-2), (3, 2e-3), (5, 2e-4), (10, 1e-5), (100, 1e-8)):
        for confidence in (0.9, 0.95):
            prob = (1 + confidence) / 2
            found = dice.student_quantile(NormalDist().inv_cdf(prob), degrees=degrees)
            assert found == pytest.approx(stats.t.ppf(prob, degrees), rel=error)


def test_interval_of_exact_scores_is_students() -> None:
    exact = scores((0.9, 0.7), (0.7, 0.7), (0.8, 0.9), (0.6, 0.6))
    means = exact.dice.mean(axis=1)
    expected = stats.t.interval(0.95, 3, loc=means.mean(), scale=stats.sem(means))
    assert dice.interval(exact) == pytest.approx(expected, abs=1e-3)


def test_too_few_patients_to_judge_how_they_differ_have_the_cautious_interval() -> None:
    two = scores((0.8, 0.8), (0.8, 0.8))
    assert dice.interval(two) == dice.interval(two.sums())
    low, high = dice.interval(two) or (0, 0)
    assert low < 0.3 and high > 0.95


def covered(*, noise_std: float, patients: int, exact: bool, draws: int = 1000) -> float:
    """How often the interval holds the true mean, over draws of patients and noise."""
    rng = np.random.default_rng(3)
    truth = drawn(rng, patients=500_000).dice.mean()
    hits = 0
    for _ in range(draws):
        own = drawn(rng, patients=patients)
        noised = DiceSums(
            sums=own.sums().sums + rng.normal(0, noise_std, 3) if noise_std else own.sums().sums
        )
        low, high = dice.interval(own if exact else noised, noise_std=noise_std) or (0.0, 1.0)
        hits += low <= truth <= high
    return hits / draws


@pytest.mark.parametrize("patients", [5, 11, 65])
def test_interval_of_exact_scores_holds_the_true_mean_as_often_as_it_says(patients: int) -> None:
    assert covered(noise_std=0.0, patients=patients, exact=True) >= 0.93


@pytest.mark.parametrize("noise_std", [0.6, 1.5, 10.0])
def test_interval_of_noised_sums_holds_the_true_mean_at_least_as_often_as_it_says(noise_std: float) -> None:
    assert covered(noise_std=noise_std, patients=65, exact=False) >= 0.95


def test_interval_is_all_there_is_where_noise_drowns_the_patients() -> None:
    sums = DiceSums(sums=np.array([1.0, 1.0, 5.0]))
    assert dice.interval(sums, noise_std=50.0) == (0.0, 1.0)


def test_interval_grows_with_the_noise_and_holds_the_mean() -> None:
    sums = drawn(np.random.default_rng(0), patients=65).sums()
    widths = []
    for noise_std in (0.0, 0.5, 1.0, 2.0, 4.0):
        low, high = dice.interval(sums, noise_std=noise_std)
        assert low <= dice.mean(sums) <= high
        widths.append(high - low)
    assert widths == sorted(widths) and widths[0] < widths[-1]


@pytest.mark.parametrize(
    ("noise_std", "confidence", "told"),
    [(-1.0, 0.95, "noise_std"), (math.nan, 0.95, "noise_std"), (0.0, 1.0, "confidence")],
)
def test_impossible_noise_or_confidence_is_refused(noise_std: float, confidence: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dice.interval(scores((0.5,)).sums(), noise_std=noise_std, confidence=confidence)


def test_exact_scores_have_no_noise() -> None:
    with pytest.raises(ValueError, match="noise_std=0 for exact"):
        dice.interval(scores((0.5,), (0.6,)), noise_std=1.0)
