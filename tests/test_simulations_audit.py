"""The arithmetic of the audit: closed forms, a second way to compute them, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.calibration import noise_multiplier
from simulations.audit import Guesses, guess, lower_bound, p_value


def guesses_of(right: int, of: int, *, num_canaries: int | None = None) -> Guesses:
    return Guesses(num_canaries=num_canaries or of, num_guesses=of, num_right=right)


def by_the_book(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """The theorem written out with integers' binomial coefficients."""
    right, trials = guesses.num_right, guesses.num_guesses
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    weights = [
        math.comb(trials, number) * chance**number * (1 - chance) ** (trials - number)
        for number in range(trials + 1)
    ]
    slopes = [sum(weights[right - steps : right]) / steps for steps in range(1, right + 1)]
    return min(1.0, sum(weights[right:]) + 2 * guesses.num_canaries * delta * max(slopes, default=1.0))


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 6.0])
@pytest.mark.parametrize(("right", "of"), [(1, 1), (5, 9), (60, 100), (100, 100), (271, 300)])
def test_p_value_is_that_of_the_theorem(right: int, of: int, epsilon: float, delta: float) -> None:
    found = guesses_of(right, of, num_canaries=1000)
    expected = by_the_book(found, epsilon=epsilon, delta=delta)
    assert p_value(found, epsilon=epsilon, delta=delta) == pytest.approx(expected, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("of", [10, 100, 3000])
def test_all_guesses_right_prove_the_closed_form(of: int, confidence: float) -> None:
    """(e^epsilon / (1 + e^epsilon))^guesses = 1 - confidence."""
    chance = (1 - confidence) ** (1 / of)
    bound = lower_bound(guesses_of(of, of), delta=0.0, confidence=confidence)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=2e-4)


@pytest.mark.parametrize("right", [0, 30, 50, 58])
def test_guesses_that_are_no_better_than_chance_prove_nothing(right: int) -> None:
    """58 of 100 or more come by chance in one of fifteen trials."""
    assert lower_bound(guesses_of(right, 100), delta=0.0, confidence=0.95) == 0.0
    assert lower_bound(guesses_of(59, 100), delta=0.0, confidence=0.95) > 0.0


def test_delta_that_could_tell_every_coin_leaves_nothing_to_prove() -> None:
    assert lower_bound(guesses_of(100, 100), delta=0.05, confidence=0.95) == 0.0


COUNTS = st.integers(1, 300).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


@settings(max_examples=150, deadline=None)
@given(
    COUNTS,
    st.sampled_from([0.0, 1e-7, 1e-5, 1e-4]),
    st.floats(0.0, 6.0),
    st.floats(0.0, 2.0),
)
def test_p_value_grows_with_epsilon_where_it_can_refute(
    counts: tuple[int, int], delta: float, epsilon: float, more: float
) -> None:
    found = guesses_of(*counts, num_canaries=1000)
    first = p_value(found, epsilon=epsilon, delta=delta)
    second = p_value(found, epsilon=epsilon + more, delta=delta)
    assert second >= min(first, 0.05) - 1e-12


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.sampled_from([0.0, 1e-6, 1e-5]))
def test_bound_grows_with_right_guesses_and_falls_with_delta_and_confidence(
    counts: tuple[int, int], delta: float
) -> None:
    right, of = counts
    here = lower_bound(guesses_of(right, of, num_canaries=1000), delta=delta, confidence=0.95)
    if right < of:
        assert lower_bound(guesses_of(right + 1, of, num_canaries=1000), delta=delta, confidence=0.95) >= here
    for worse in ({"delta": delta + 1e-5, "confidence": 0.95}, {"delta": delta, "confidence": 0.99}):
        assert lower_bound(guesses_of(right, of, num_canaries=1000), **worse) <= here


def test_highest_scores_are_guessed_in_and_lowest_out() -> None:
    scores = np.array([0.1, 9.0, -3.0, 0.2, 5.0, -7.0])
    included = np.array([True, True, True, False, False, False])
    found = guess(scores, included, num_guesses=4)
    assert found == Guesses(num_canaries=6, num_guesses=4, num_right=2), "9.0 in and -7.0 out are right"
    assert guess(scores, included, num_guesses=2).num_right == 2


def test_scores_that_know_the_coins_are_always_right() -> None:
    included = np.random.default_rng(0).random(500) < 0.5
    found = guess(included.astype(float), included, num_guesses=100)
    assert found.num_right == found.num_guesses == 100


def bounds_of_randomised_response(
    *, epsilon: float, delta: float, num_canaries: int, trials: int
) -> np.ndarray:
    """Bounds for the mechanism that leaks most: each answer is true with e^epsilon / (1 + e^epsilon), and
    with probability delta it is the coin itself."""
    rng = np.random.default_rng(1)
    chance = 1 / (1 + math.exp(-epsilon))
    bounds = []
    for _ in range(trials):
        right = int((rng.random(num_canaries) < delta + (1 - delta) * chance).sum())
        bounds.append(lower_bound(guesses_of(right, num_canaries), delta=delta, confidence=0.95))
    return np.array(bounds)


@pytest.mark.parametrize("delta", [0.0, 1e-5])
def test_bound_exceeds_the_epsilon_of_the_leakiest_mechanism_as_often_as_stated(delta: float) -> None:
    trials = 2000
    bounds = bounds_of_randomised_response(epsilon=1.5, delta=delta, num_canaries=1000, trials=trials)
    share = float((bounds > 1.5).mean())
    assert share < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert float(np.median(bounds)) > 1.3, "and it is tight"
    if delta == 0:
        assert share > 0.02, "not by being far too low"


def gaussian_bounds(*, epsilon: float, delta: float, num_canaries: int, trials: int) -> np.ndarray:
    """Bounds for one release of all canaries by a Gaussian mechanism of a known epsilon."""
    std = noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    rng = np.random.default_rng(2)
    bounds = []
    for _ in range(trials):
        included = rng.random(num_canaries) < 0.5
        scores = included + std * rng.standard_normal(num_canaries)
        found = guess(scores, included, num_guesses=300)
        bounds.append(lower_bound(found, delta=delta, confidence=0.95))
    return np.array(bounds)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_bound_never_exceeds_the_epsilon_of_a_gaussian_mechanism(epsilon: float) -> None:
    bounds = gaussian_bounds(epsilon=epsilon, delta=1e-5, num_canaries=5000, trials=200)
    assert bounds.max() < epsilon, "a Gaussian leaks less than its epsilon at delta allows for every coin"


def test_bound_of_a_gaussian_mechanism_of_epsilon_3_is_at_least_one() -> None:
    assert float(np.median(gaussian_bounds(epsilon=3.0, delta=1e-5, num_canaries=5000, trials=50))) > 1.2
