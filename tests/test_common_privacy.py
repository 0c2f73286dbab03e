from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import calibration, privacy
from common.calibration import mechanism, run_spends
from common.errors import ConfigError, PrivacyTargetError
from common.privacy import Epsilon, Spend, epsilon, merged, worst_epsilon
from tests.plans import plan

Floats = npt.NDArray[np.float64]

_HIGHEST_LOSS = 20.0
_LOSS_STEP = 1e-4


def spend(noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1) -> Spend:
    return Spend(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def gaussian_delta(mu: float, eps: float) -> float:
    """Balle and Wang (2018), Theorem 8, in logarithms."""
    logs = torch.special.log_ndtr(torch.tensor([mu / 2 - eps / mu, -mu / 2 - eps / mu], dtype=torch.float64))
    return math.exp(logs[0].item()) - math.exp(eps + logs[1].item())


def ndtr(x: Any) -> Any:
    """The distribution function of the normal distribution."""
    return torch.special.ndtr(torch.from_numpy(x)).numpy()


def bracket(history: Sequence[Spend], *, delta: float) -> tuple[float, float]:
    """Returns a lower and an upper bound of epsilon, by composing the privacy loss on a grid.

    An implementation of our own: losses of both directions (add, remove) are rounded down or up to the
    grid, and convolved by FFT. Koskela, Jälkö and Honkela (2020), Computing Tight Differential Privacy
    Guarantees Using FFT.
    """
    bounds = []
    for is_upper in (False, True):
        removed, added = (
            _composed_epsilon(history, delta=delta, is_upper=is_upper, removes=removes)
            for removes in (True, False)
        )
        bounds.append(max(removed, added))
    return bounds[0], bounds[1]


def _composed_epsilon(history: Sequence[Spend], *, delta: float, is_upper: bool, removes: bool) -> float:
    half = round(_HIGHEST_LOSS / _LOSS_STEP)
    losses: Floats = np.arange(-half, half, dtype=np.float64) * _LOSS_STEP
    spectrum = np.ones(half + 1, dtype=np.complex128)
    for one in history:
        density = _loss_density(one, losses, is_upper=is_upper, removes=removes)
        spectrum *= np.fft.rfft(np.fft.ifftshift(density)) ** one.steps
    composed = np.fft.fftshift(np.fft.irfft(spectrum, n=2 * half))
    low, high = 0.0, _HIGHEST_LOSS / 2
    for _ in range(40):
        middle = (low + high) / 2
        above = losses > middle
        cost = float(np.sum(composed[above] * -np.expm1(middle - losses[above])))
        low, high = (middle, high) if cost > delta else (low, middle)
    return high


def _loss_density(one: Spend, losses: Floats, *, is_upper: bool, removes: bool) -> Floats:
    """Probability of each loss of one step; a patient moves the mean from 0 to 1 with the sample rate."""
    edges = np.append(losses, _HIGHEST_LOSS)
    if removes:
        below = _mixture_cdf(_outcome(edges, one), one)
    else:
        below = 1 - ndtr(_outcome(-edges, one) / one.noise_multiplier)
    below[0], below[-1] = 0.0, 1.0
    mass = np.diff(below)
    return np.roll(mass, 1) if is_upper else mass


def _outcome(loss: Floats, one: Spend) -> Any:
    """Where log(mixture/normal) reaches a loss; the mixture has the patient with the sample rate."""
    ratio = (np.exp(loss) - 1 + one.sample_rate) / one.sample_rate
    with np.errstate(divide="ignore"):
        return 0.5 + one.noise_multiplier**2 * np.log(np.maximum(ratio, 0.0))


def _mixture_cdf(outcome: Floats, one: Spend) -> Any:
    with_patient = ndtr((outcome - 1) / one.noise_multiplier)
    return (1 - one.sample_rate) * ndtr(outcome / one.noise_multiplier) + one.sample_rate * with_patient


@pytest.mark.parametrize("delta", [1e-6, 1e-3])
@pytest.mark.parametrize("sigma", [0.15, 0.5, 1.0, 5.0, 50.0])
def test_epsilon_of_one_gaussian_release_solves_the_closed_form(sigma: float, delta: float) -> None:
    bound = epsilon([spend(sigma)], delta=delta)
    assert bound.accountant == "gaussian"
    assert gaussian_delta(1 / sigma, bound.value) == pytest.approx(delta, rel=1e-9)


def test_epsilon_of_published_gaussian_releases() -> None:
    """mu-GDP at delta 1e-5: 1 has epsilon 4.377, 0.5 has 1.993 (Balle and Wang 2018, analytic Gaussian)."""
    assert epsilon([spend(1.0)], delta=1e-5).value == pytest.approx(4.377, abs=1e-3)
    assert epsilon([spend(2.0)], delta=1e-5).value == pytest.approx(1.993, abs=1e-3)


def test_gaussian_releases_compose_as_one_with_the_root_of_summed_squares() -> None:
    composed = epsilon([spend(2.0, steps=9), spend(1.0, steps=2)], delta=1e-5)
    assert composed.value == pytest.approx(epsilon([spend((9 / 4 + 2) ** -0.5)], delta=1e-5).value, rel=1e-9)


def test_a_release_that_is_private_without_noise_costs_nothing() -> None:
    """At a total variation below delta epsilon is 0."""
    assert epsilon([spend(1e5)], delta=1e-2).value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("history", [[], [spend(1.0, 0.1, 0)], [spend(1.0, steps=0)]])
def test_nothing_released_costs_nothing(history: list[Spend]) -> None:
    assert epsilon(history, delta=1e-5) == Epsilon(value=0.0, accountant="gaussian")


@pytest.mark.parametrize(
    ("sigma", "sample_rate", "steps", "published"),
    [
        # Abadi et al. (2016), section 3.2 and figure 2
        pytest.param(4.0, 0.01, 10_000, 1.26, marks=pytest.mark.slow),
        # Bu, Dong, Long and Su (2020), Deep Learning with Gaussian Differential Privacy, moments accountant
        (1.3, 256 / 60_000, 15 * 60_000 // 256, 1.19),
        (1.3, 256 / 60_000, 20 * 60_000 // 256, 1.34),
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 3.01),
        (0.7, 256 / 60_000, 70 * 60_000 // 256, 8.68),
    ],
)
def test_epsilon_is_below_the_published_moments_accountant_but_not_by_much(
    sigma: float, sample_rate: float, steps: int, published: float
) -> None:
    bound = epsilon([spend(sigma, sample_rate, steps)], delta=1e-5)
    assert bound.accountant == "prv"
    assert 0.7 * published < bound.value < published


HISTORIES = [
    [spend(0.8, 0.3, 1)],
    [spend(1.0, 0.2, 20)],
    [spend(2.6, 0.2, 100)],
    [spend(0.6, 0.02, 30)],
    [spend(1.5, 0.9, 5)],
    [spend(1.5, 0.1, 40), spend(3.0, 0.4, 10), spend(4.0, 1.0, 2)],
]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_epsilon_lies_within_the_bounds_of_an_independent_accountant(history: list[Spend]) -> None:
    lower, upper = bracket(history, delta=1e-5)
    assert upper < 1.02 * lower, "the oracle is too coarse to say anything"
    bound = epsilon(history, delta=1e-5)
    assert bound.accountant == "prv"
    assert lower <= bound.value <= 1.004 * upper


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_renyi_bound_is_above_the_independent_accountant(history: list[Spend]) -> None:
    """The fall-back is looser, never wrong."""
    lower, upper = bracket(history, delta=1e-5)
    assert lower <= privacy._rdp_epsilon(tuple(history), 1e-5) <= 1.6 * upper


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_renyi_bound_is_that_of_opacus(history: list[Spend]) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(one.noise_multiplier, one.sample_rate, one.steps) for one in history]
    theirs = accountant.get_epsilon(delta=1e-5)
    assert privacy._rdp_epsilon(tuple(history), 1e-5) == pytest.approx(theirs, rel=1e-9)


def test_single_sampled_step_solves_its_closed_form() -> None:
    """Remove one patient: hockey-stick divergence of (1-q) N(0, s) + q N(1, s) from N(0, s)."""
    one, delta = spend(0.9, 0.25), 1e-5
    value = epsilon([one], delta=delta).value
    outcome = _outcome(np.array([value]), one)
    cost = 1 - _mixture_cdf(outcome, one) - np.exp(value) * (1 - ndtr(outcome / one.noise_multiplier))
    assert cost[0] == pytest.approx(delta, rel=0.05)
    assert cost[0] <= delta


def test_extreme_noise_falls_back_to_the_renyi_bound() -> None:
    bound = epsilon([spend(0.02, 0.01, 100)], delta=1e-5)
    assert bound.accountant == "rdp"
    assert math.isfinite(bound.value)
    assert bound.value > 1000


def test_epsilon_of_rounds_is_that_of_one_accountant_over_all_steps() -> None:
    rounds = [spend(1.2, 0.1, 4) for _ in range(10)]
    assert epsilon(rounds, delta=1e-5) == epsilon([spend(1.2, 0.1, 40)], delta=1e-5)
    assert epsilon(rounds, delta=1e-5).value > 1.5 * epsilon(rounds[:1], delta=1e-5).value


def test_order_of_releases_does_not_matter() -> None:
    history = [spend(1.2, 0.1, 4), spend(2.0, 0.3, 3), spend(1.2, 0.1, 2)]
    assert epsilon(history, delta=1e-5) == epsilon(history[::-1], delta=1e-5)


SPENDS = st.builds(spend, st.sampled_from([0.5, 1.0]), st.sampled_from([0.1, 1.0]), st.integers(0, 5))


@settings(deadline=None)
@given(st.lists(SPENDS))
def test_merging_keeps_the_steps_of_every_kind_and_repeats_no_kind(history: list[Spend]) -> None:
    result = merged(history)
    kinds = [(one.noise_multiplier, one.sample_rate) for one in result]
    assert kinds == sorted(set(kinds))
    for one in result:
        same = [s.steps for s in history if (s.noise_multiplier, s.sample_rate) == kinds[result.index(one)]]
        assert one.steps == sum(same) > 0
    assert sum(one.steps for one in result) == sum(one.steps for one in history)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (spend(1.5, 0.1, 40), spend(1.5, 0.1, 44)),
        (spend(1.5, 0.1, 40), spend(1.5, 0.11, 40)),
        (spend(1.5, 0.1, 40), spend(1.4, 0.1, 40)),
        (spend(1.5, 0.9, 4), spend(1.5, 1.0, 4)),
        (spend(3.0, 1.0, 4), spend(3.0, 1.0, 5)),
    ],
)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(less: Spend, more: Spend) -> None:
    assert epsilon([less], delta=1e-5).value < epsilon([more], delta=1e-5).value
    assert epsilon([less], delta=1e-4).value < epsilon([less], delta=1e-5).value


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (3.0, 1e-4, 0.2, 100),
        (1.0, 1e-5, 0.05, 60),
        (0.1, 1e-4, 0.3, 10),
        (8.0, 1e-6, 0.02, 30),
        (3.0, 1e-4, 0.2, 1),
        (3.0, 1e-4, 1.0, 40),
        (0.5, 1e-5, 1.0, 1),
        (50.0, 1e-4, 1.0, 3),
        (500.0, 1e-4, 1.0, 1),
        pytest.param(50.0, 1e-4, 0.2, 80, marks=pytest.mark.slow),
        pytest.param(0.5, 1e-4, 0.01, 1000, marks=pytest.mark.slow),
        pytest.param(10.0, 1e-7, 0.5, 400, marks=pytest.mark.slow),
    ],
)
def test_calibrated_noise_reaches_the_target_within_one_percent(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibration.noise_multiplier(target_epsilon=target, delta=delta, sample_rate=rate, steps=steps)
    assert sigma == float(f"{sigma:.5g}") or sigma == round(sigma, 4)
    assert 0.99 * target <= epsilon([spend(sigma, rate, steps)], delta=delta).value <= target


def test_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(PrivacyTargetError, match="target_epsilon=0.001 at delta=1e-05 .* 1000000 steps"):
        calibration.noise_multiplier(target_epsilon=1e-3, delta=1e-5, sample_rate=1.0, steps=1_000_000)
    assert issubclass(PrivacyTargetError, ConfigError)


def test_run_without_steps_costs_nothing() -> None:
    idle = plan(training__local_steps=0)
    spends = run_spends(idle, nominal_patients=100, parts=("train", "validation", "test"))
    assert spends["train"] == ()
    assert mechanism(idle, nominal_patients=100).training(0).steps == 0


@pytest.mark.parametrize(("nominal", "rate"), [(640, 0.1), (128, 0.5), (64, 1.0), (1, 1.0)])
def test_sample_rate_is_expected_batch_over_nominal_patients(nominal: int, rate: float) -> None:
    assert calibration.sample_rate(plan(training__expected_batch=64), nominal_patients=nominal) == rate


SMALL: dict[str, Any] = {
    "rounds": 4,
    "training__local_steps": 3,
    "training__expected_batch": 20,
    "evaluation__validation_every": 2,
}


def test_training_of_all_rounds_costs_the_target() -> None:
    small = plan(**SMALL)
    chosen = mechanism(small, nominal_patients=100)
    assert chosen.sample_rate == 0.2
    assert 0.99 * 3 <= epsilon([chosen.training(12)], delta=1e-4).value <= 3


def test_mechanism_follows_from_steps_rate_and_target_alone() -> None:
    """What is not one of them, the seed and the rounds among it, changes nothing."""
    chosen = mechanism(plan(**SMALL), nominal_patients=100)
    same = plan(
        rounds=2, training__local_steps=6, training__expected_batch=20, seed=5, study="b", sites=9,
        training__learning_rate=0.1, training__cases_per_patient=1, privacy__max_grad_norm=7.0,
        evaluation__validation_every=1,
    )  # fmt: skip
    assert mechanism(same, nominal_patients=100).training(1) == chosen.training(1)
    assert mechanism(plan(**SMALL), nominal_patients=101) != chosen


def test_named_noise_multiplier_is_used_as_it_stands() -> None:
    named = plan(**SMALL, privacy__noise_multiplier=1.25, privacy__target_epsilon=None)
    chosen = mechanism(named, nominal_patients=100)
    assert chosen.noise_multiplier == 1.25
    training = epsilon([chosen.training(12)], delta=1e-4).value
    assert 0.99 * training <= epsilon([chosen.evaluation("test")], delta=1e-4).value <= training


@pytest.mark.parametrize(("every", "releases"), [(1, 4), (2, 2), (3, 1)])
def test_evaluations_of_a_part_cost_the_target_together(every: int, releases: int) -> None:
    evaluated = plan(**SMALL | {"evaluation__validation_every": every})
    assert len(evaluated.validation_rounds) == releases
    chosen = mechanism(evaluated, nominal_patients=100)
    for history in ([chosen.evaluation("validation")] * releases, [chosen.evaluation("test")]):
        assert {one.sample_rate for one in history} == {1.0}
        assert 0.99 * 3 <= epsilon(history, delta=1e-4).value <= 3


def test_named_evaluation_noise_is_used_as_it_stands() -> None:
    named = plan(**SMALL, evaluation__noise_multiplier=7.5)
    assert mechanism(named, nominal_patients=100).evaluation_noise_multiplier == {
        "validation": 7.5,
        "test": 7.5,
    }


def test_without_privacy_there_is_no_noise_and_nothing_to_charge() -> None:
    open_plan = plan(**SMALL, privacy="none")
    chosen = mechanism(open_plan, nominal_patients=100)
    assert (chosen.noise_multiplier, chosen.sample_rate) == (0.0, 0.2)
    assert chosen.evaluation_noise_multiplier == {}
    assert run_spends(open_plan, nominal_patients=100, parts=("train", "test")) == {}


def test_run_charges_exactly_the_parts_that_a_site_has() -> None:
    small = plan(**SMALL)
    chosen = mechanism(small, nominal_patients=100)
    spends = run_spends(small, nominal_patients=100, parts=("train", "validation"))
    assert spends == {"train": (chosen.training(12),), "validation": (chosen.evaluation("validation", 2),)}


def test_run_that_never_evaluates_charges_no_evaluation() -> None:
    silent = plan(**SMALL | {"evaluation__validation_every": 0, "evaluation__test_at_end": False})
    spends = run_spends(silent, nominal_patients=100, parts=("validation", "test"))
    assert spends == {"validation": (), "test": ()}


def test_parts_are_disjoint_so_the_largest_epsilon_counts() -> None:
    low, high = (spend(4.0),), (spend(2.0),)
    expected = epsilon(high, delta=1e-5)
    assert worst_epsilon({"train": low, "test": high}, delta=1e-5) == expected
    assert worst_epsilon({}, delta=1e-5).value == 0
