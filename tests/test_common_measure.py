from __future__ import annotations

import math

import numpy as np
import pytest

from common import dice, measure, scores
from common.dice import DiceScores, DiceSums
from common.metrics import Histogram, Scores
from tests.plans import asked

MASKS = asked(target="mask", classes=("background", "a", "b"), size=(8, 8, 8))
LABELS = asked(target="labels", classes=("a", "b"))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("wanted", [asked(), asked(classes=("a", "b", "c")), LABELS, MASKS])
def test_arrays_of_every_plan_become_the_statistic_that_they_came_from(wanted, exact):
    kinds = measure.arrays_of(wanted, bins=7, exact=exact)
    arrays = {
        name: np.ones([3 if axis == measure.ANY else axis for axis in kind.shape], kind.dtype)
        for name, kind in kinds.items()
    }
    found = measure.statistic(arrays)
    expected = {True: (Scores, DiceScores), False: (Histogram, DiceSums)}[exact][wanted is MASKS]
    assert isinstance(found, expected)
    assert {name: array.tolist() for name, array in found.arrays.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_sensitivity_is_that_of_the_statistic():
    assert measure.l2_sensitivity(asked()) == 1
    assert measure.l2_sensitivity(LABELS) == scores.l2_sensitivity(2) == pytest.approx(math.sqrt(3))
    assert measure.l2_sensitivity(MASKS) == dice.l2_sensitivity(2) == pytest.approx(math.sqrt(1.5))


def test_masks_are_merged_valued_and_bounded_as_dice_and_all_else_as_scores():
    one, two = DiceScores(dice=np.array([[0.5, 1.0]])), DiceScores(dice=np.array([[0.0, 0.5]]))
    merged = measure.merge({"a": one, "b": measure.noised(two, bins=10)})
    assert isinstance(merged, DiceSums) and measure.value(merged) == 0.5
    assert measure.interval(merged, noise_std=3.0) == dice.interval(merged, noise_std=3.0)
    scored = scores.score_statistics([[1.0], [-1.0]], targets=[1, 0], weights=[1.0, 1.0])
    assert measure.value(measure.merge({"a": scored, "b": scored})) == 1.0
    assert isinstance(measure.merge({"a": scored, "b": measure.noised(scored, bins=4)}), Histogram)


def test_statistics_of_different_plans_do_not_merge():
    with pytest.raises((ValueError, AttributeError)):
        measure.merge(
            {
                "a": DiceScores(dice=np.array([[0.5]])),
                "b": scores.score_statistics([[1.0]], targets=[1], weights=[1.0]),
            }
        )
    with pytest.raises(ValueError, match="at least one"):
        measure.merge({})


def test_the_bits_of_a_merged_number_do_not_depend_on_which_site_answered_first():
    values = np.random.default_rng(0).random(99).tolist()
    assert sum(values) != sum(reversed(values)), "in floating point the order matters"
    exact = {f"{place:02}": DiceScores(dice=np.array([[value]])) for place, value in enumerate(values)}
    for found in (exact, {site: measure.noised(known, bins=10) for site, known in exact.items()}):
        turned = dict(reversed(found.items()))
        first, second = measure.merge(found).arrays, measure.merge(turned).arrays
        assert all(np.array_equal(first[name], second[name]) for name in first)
