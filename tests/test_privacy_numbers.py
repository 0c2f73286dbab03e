"""Epsilon against a second implementation; calibration over many settings.

The second implementation is Google's dp-accounting: privacy loss distributions on a grid, rounded so that
they bound epsilon from above or from below (Koskela, Jälkö, Honkela 2020; Doroshenko et al. 2022, Connect
the Dots). It shares no code with Opacus' PRV accountant or with our closed form.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import reduce
from typing import Any

import pytest
from absl import logging as absl_logging
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from common import calibration
from common.calibration import mechanism, run_spends
from common.plan import Plan
from common.privacy import Spend, epsilon
from tests.plans import plan

# dp-accounting's log keeps the stream that pytest captures, and closes it when Hydra sets up a log.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def spend(noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1) -> Spend:
    return Spend(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def second_opinion(
    history: Sequence[Spend], *, delta: float, is_upper: bool = True, interval: float = 1e-4
) -> float:
    """Epsilon of a history by dp-accounting: bounded from above, closely, or from below."""
    parts = [
        pld.from_gaussian_mechanism(
            one.noise_multiplier,
            sampling_prob=one.sample_rate,
            pessimistic_estimate=is_upper,
            value_discretization_interval=interval,
            use_connect_dots=is_upper,
        ).self_compose(one.steps)
        for one in history
    ]
    composed = reduce(lambda first, second: first.compose(second), parts)
    return float(composed.get_epsilon_for_delta(delta))


HUNDRED_ROUNDS = [
    [spend(3.2, 0.2, 400)],
    [spend(1.1, 0.01, 1000)],
    [spend(0.8, 0.002, 2000)],
]
SETTINGS = [
    ([spend(1.0)], 1e-5),
    ([spend(4.0, 1.0, 20)], 1e-4),
    ([spend(2.0, 1.0, 7), spend(11.0, 1.0, 100)], 1e-6),
    ([spend(0.6, 0.01, 1)], 1e-5),
    ([spend(2.65, 0.2, 100)], 1e-4),
    ([spend(1.2, 0.05, 60)], 1e-6),
    ([spend(5.0, 0.9, 30)], 1e-4),
    ([spend(0.5, 1e-4, 200)], 1e-5),
    ([spend(1.3, 256 / 60_000, 3515)], 1e-5),
    *((history, 1e-5) for history in HUNDRED_ROUNDS),
    # several studies in one ledger: other rates, other noise, some releases of every patient
    ([spend(2.6, 0.2, 100), spend(1.4, 0.05, 200)], 1e-4),
    ([spend(1.5, 0.1, 40), spend(3.0, 0.4, 10), spend(4.0, 1.0, 2)], 1e-5),
    ([spend(6.0, 0.5, 25), spend(0.9, 0.01, 300), spend(30.0, 1.0, 5)], 1e-5),
]


@pytest.mark.parametrize(("history", "delta"), SETTINGS, ids=str)
@pytest.mark.slow
def test_epsilon_is_that_of_a_second_implementation(history: list[Spend], delta: float) -> None:
    """Never below its lower bound, and at most half a percent above its upper one, which has converged."""
    low = second_opinion(history, delta=delta, is_upper=False, interval=1e-3)
    high = second_opinion(history, delta=delta)
    coarse = second_opinion(history, delta=delta, interval=1e-3)
    assert low <= high <= coarse < 1.01 * high, "the second opinion is too coarse to say anything"
    found = epsilon(history, delta=delta)
    assert found.accountant == ("gaussian" if all(one.sample_rate == 1 for one in history) else "prv")
    assert max(low, 0.999 * high) <= found.value <= 1.005 * high


@pytest.mark.parametrize("history", HUNDRED_ROUNDS, ids=str)
def test_hundred_rounds_charged_one_by_one_cost_what_the_second_implementation_says_of_all(
    history: list[Spend],
) -> None:
    (one,) = history
    rounds = [spend(one.noise_multiplier, one.sample_rate, one.steps // 100)] * 100
    high = second_opinion(history, delta=1e-5)
    assert 0.999 * high <= epsilon(rounds, delta=1e-5).value <= 1.005 * high
    assert epsilon(rounds[:1], delta=1e-5).value < 0.6 * high


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.05, 0.05, 50), (0.03, 0.3, 100)])
def test_fall_back_lies_above_the_second_implementation(noise: float, rate: float, steps: int) -> None:
    """Where PRV finds no grid, RDP stands in: looser, and an upper bound all the same."""
    found = epsilon([spend(noise, rate, steps)], delta=1e-5)
    assert found.accountant == "rdp"
    below = second_opinion([spend(noise, rate, steps)], delta=1e-5, is_upper=False, interval=0.1)
    assert 0.2 * found.value <= below <= found.value


CALIBRATIONS = [
    (target, delta, rate, steps)
    for target in (0.3, 3.0, 12.0)
    for delta, rate, steps in [
        (1e-4, 1.0, 1),
        (1e-4, 1.0, 10_000),
        (1e-5, 0.5, 1),
        (1e-4, 0.2, 100),
        (1e-6, 0.01, 1000),
        (1e-5, 1e-3, 1),
        (1e-5, 1e-4, 100),
        (1e-5, 1e-3, 10_000),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "delta", "rate", "steps"), CALIBRATIONS)
def test_calibrated_noise_costs_the_target_in_the_second_implementation_too(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibration.noise_multiplier(target_epsilon=target, delta=delta, sample_rate=rate, steps=steps)
    charged = epsilon([spend(sigma, rate, steps)], delta=delta).value
    assert 0.99 * target <= charged <= target
    other = second_opinion([spend(sigma, rate, steps)], delta=delta)
    assert 0.985 * target <= other <= 1.001 * target


@pytest.mark.slow
def test_noise_is_never_below_the_least_even_where_delta_alone_would_hide_a_step() -> None:
    """Sampled with a tenth of delta: by the formula no noise is needed; a drawn patient would be seen."""
    sigma = calibration.noise_multiplier(target_epsilon=1.0, delta=1e-4, sample_rate=1e-5, steps=1)
    assert sigma >= 0.01
    assert epsilon([spend(sigma, 1e-5, 1)], delta=1e-4).value <= 1.0


WIDE: dict[str, Any] = {
    "rounds": st.sampled_from([1, 2, 5, 16, 40]),
    "training__local_steps": st.sampled_from([1, 3, 10]),
    "training__expected_batch": st.sampled_from([1, 20, 300]),
    "privacy__target_epsilon": st.sampled_from([0.2, 1.0, 3.0, 8.0]),
    "privacy__delta": st.sampled_from([1e-6, 1e-4, 1e-3]),
    "evaluation__test_at_end": st.booleans(),
    "privacy__max_noise_multiplier": st.just(1e4),
}


@st.composite
def asked(draw: st.DrawFn) -> tuple[Plan, int]:
    changes = {name: draw(values) for name, values in WIDE.items()}
    changes["evaluation__validation_every"] = draw(st.integers(0, changes["rounds"]))
    return plan(**changes), draw(st.sampled_from([40, 300, 5000, 100_000]))


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True)
@given(asked())
def test_charges_of_a_run_compose_to_at_most_the_target_and_within_a_percent(
    question: tuple[Plan, int],
) -> None:
    """Each part of the cohort alone, as a site's ledger composes them: parts share no patient."""
    plan, nominal = question
    target, delta = plan.privacy.target_epsilon, plan.privacy.delta
    spends = run_spends(plan, nominal_patients=nominal, parts=("train", "validation", "test"))
    costs = {part: epsilon(history, delta=delta).value for part, history in spends.items()}
    assert bool(costs["validation"]) == bool(plan.validation_rounds)
    assert bool(costs["test"]) == plan.evaluation.test_at_end
    for cost in filter(None, costs.values()):
        assert 0.99 * target <= cost <= target
    rate = min(1.0, plan.training.expected_batch / nominal)
    if rate > 10 * delta or plan.num_steps > 10:  # else delta may hide the step, and the least noise do
        assert costs["train"] > 0


@pytest.mark.parametrize("sigma", [0.7, 1.3, 6.0])
def test_run_with_a_named_multiplier_charges_that_and_evaluates_at_its_cost(sigma: float) -> None:
    named = plan(
        rounds=10,
        privacy__noise_multiplier=sigma,
        privacy__target_epsilon=None,
        training__expected_batch=20,
        evaluation__validation_every=2,
    )
    spends = run_spends(named, nominal_patients=400, parts=("train", "validation", "test"))
    assert spends["train"] == (spend(sigma, 0.05, named.num_steps),)
    costs = {part: epsilon(history, delta=1e-4).value for part, history in spends.items()}
    assert costs["train"] == pytest.approx(second_opinion(spends["train"], delta=1e-4), rel=5e-3)
    for part in ("validation", "test"):
        assert 0.99 * costs["train"] <= costs[part] <= costs["train"]


def test_noise_of_a_released_histogram_is_one_function_for_site_and_server() -> None:
    for classes, heads in ((("a", "b"), 1), (("a", "b", "c"), 4)):
        many = plan(classes=classes)
        multiplier = mechanism(many, nominal_patients=400).evaluation_noise_multiplier["test"]
        std = calibration.measure_noise_std(many, nominal_patients=400, part="test")
        assert std == multiplier * math.sqrt(heads)
