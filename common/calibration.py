"""Calibration: from a plan's target and a site's public number of patients to noise, rate and charges.

Everything here is a function of public values; nothing reads data or state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from common import landmarks, measure
from common.errors import PrivacyTargetError
from common.plan import DpSgd, Plan
from common.privacy import WHOLE_ORDERS, Spend, epsilon, gaussian_delta, merged, rdp_bound

_SMALLEST_NOISE_MULTIPLIER, _LARGEST_NOISE_MULTIPLIER = 1e-2, 1e4
_SIGNIFICANT_DIGITS = 5
_TARGET_SLACK_FRACTION = 4e-3  # the search stops when epsilon lies this close below the target


@lru_cache(maxsize=1024)
def noise_multiplier(*, target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Returns the smallest noise multiplier whose ``steps`` cost at most ``target_epsilon``.

    Rounded up to five significant digits, so that both ends of a federation arrive at the same number; the
    epsilon of the result lies within 1 % below the target. It is never below 0.01, which may cost less:
    where delta alone nearly hides a step (a sample rate of about delta), no noise is needed for the
    formula, but a patient who is drawn would be seen.

    Raises:
        PrivacyTargetError: no multiplier up to 10,000 reaches the target.
    """
    if steps == 0:
        return 1.0  # never used: a run without steps releases nothing
    limit = _LARGEST_NOISE_MULTIPLIER
    if not _is_reachable(target_epsilon, delta=delta, rate=sample_rate, steps=steps, limit=limit):
        raise _unreachable(target_epsilon, delta=delta, rate=sample_rate, steps=steps, limit=limit)
    if sample_rate == 1.0:
        exact = math.sqrt(steps) / _gaussian_mu(target_epsilon, delta)
    else:
        exact = _sampled_multiplier(target_epsilon, delta=delta, rate=sample_rate, steps=steps)
    return _rounded_up(max(exact, _SMALLEST_NOISE_MULTIPLIER))


def _is_reachable(target: float, *, delta: float, rate: float, steps: int, limit: float) -> bool:
    if rate == 1.0:
        return math.sqrt(steps) / _gaussian_mu(target, delta) <= limit
    largest = Spend(noise_multiplier=limit, sample_rate=rate, steps=steps)
    return rdp_bound((largest,), delta, orders=WHOLE_ORDERS) <= target


def _gaussian_mu(target: float, delta: float) -> float:
    """Largest mu at which mu-Gaussian DP costs at most ``target`` at ``delta``."""
    low, high = 0.0, 1.0
    while gaussian_delta(high, target) <= delta:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, target) <= delta else (low, middle)
    return low or high  # low is 0 where even the least of noise is not enough: the caller's limit decides


def _sampled_multiplier(target: float, *, delta: float, rate: float, steps: int) -> float:
    """Starts from the multiplier of the RDP bound."""

    def spend(sigma: float) -> Spend:
        return Spend(noise_multiplier=sigma, sample_rate=rate, steps=steps)

    def cost(sigma: float) -> float:
        return epsilon([spend(sigma)], delta=delta).value

    high = _rdp_multiplier(target, delta=delta, rate=rate, steps=steps)
    low = 0.9 * high  # the tighter accountant may need less, by how much is not known
    while cost(low) <= target and low > _SMALLEST_NOISE_MULTIPLIER:
        low, high = max(0.7 * low, _SMALLEST_NOISE_MULTIPLIER), low
    return _bisect(cost, low=low, high=high, target=target)


def _rdp_multiplier(target: float, *, delta: float, rate: float, steps: int) -> float:
    """Returns the multiplier of the RDP bound: cheap, and never too small."""
    low, high = _SMALLEST_NOISE_MULTIPLIER, _LARGEST_NOISE_MULTIPLIER
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        spend = Spend(noise_multiplier=middle, sample_rate=rate, steps=steps)
        low, high = (
            (low, middle) if rdp_bound((spend,), delta, orders=WHOLE_ORDERS) <= target else (middle, high)
        )
    return high


@lru_cache(maxsize=1024)
def largest_noise_multiplier(plan: Plan, *, nominal_patients: int) -> float:
    """Returns, in no time, what a site's own multiplier does not exceed; 0 without privacy."""
    privacy = plan.privacy
    if not isinstance(privacy, DpSgd) or plan.num_steps == 0:
        return 0.0
    if privacy.noise_multiplier is not None or privacy.target_epsilon is None:
        return privacy.noise_multiplier or 0.0
    rate, target = sample_rate(plan, nominal_patients=nominal_patients), privacy.target_epsilon
    if rate == 1.0:
        exact = math.sqrt(plan.num_steps) / _gaussian_mu(target, privacy.delta)
    else:
        exact = _rdp_multiplier(target, delta=privacy.delta, rate=rate, steps=plan.num_steps)
    return _rounded_up(max(exact, _SMALLEST_NOISE_MULTIPLIER))


def _rounded_up(value: float) -> float:
    """Returns the next larger number of five significant digits, at least four decimals."""
    decimals = max(4, _SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(value)))
    return float(round(math.ceil(value * 10**decimals) / 10**decimals, decimals))


def require_reachable(plan: Plan, *, nominal_patients: int) -> None:
    """Checks, in no time, that a noise multiplier that the plan allows gives a site the plan's target.

    Raises:
        PrivacyTargetError: none does.
    """
    privacy = plan.privacy
    if not isinstance(privacy, DpSgd) or privacy.target_epsilon is None or plan.num_steps == 0:
        return
    rate, target = sample_rate(plan, nominal_patients=nominal_patients), privacy.target_epsilon
    limit = privacy.max_noise_multiplier
    if not _is_reachable(target, delta=privacy.delta, rate=rate, steps=plan.num_steps, limit=limit):
        raise _unreachable(target, delta=privacy.delta, rate=rate, steps=plan.num_steps, limit=limit)


def _unreachable(target: float, *, delta: float, rate: float, steps: int, limit: float) -> PrivacyTargetError:
    return PrivacyTargetError(
        f"Expected a reachable privacy target, found target_epsilon={target} at delta={delta} with sample "
        f"rate {rate:.3g} and {steps} steps, which no noise multiplier up to {limit:g} gives; raise "
        "target_epsilon, lower rounds or local_steps, or leave out a site with so few patients."
    )


def _bisect(cost: Callable[[float], float], *, low: float, high: float, target: float) -> float:
    """Returns an argument whose cost is within the slack below the target; cost falls, cost(high) fits."""
    best, at_best = high, cost(high)
    at_low = cost(low)
    if at_low <= target:
        return low
    while at_best < target * (1 - _TARGET_SLACK_FRACTION) and best - low > 1e-5 * best:
        # log cost is nearly a straight line in log sigma: aim a little below the target, stay inside
        share = math.log(at_low / (target * (1 - _TARGET_SLACK_FRACTION / 2))) / math.log(at_low / at_best)
        middle = low * (best / low) ** min(0.95, max(0.05, share))
        at_middle = cost(middle)
        if at_middle > target:
            low, at_low = middle, at_middle
        else:
            best, at_best = middle, at_middle
    return best


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What one site does in a run of a plan: a function of the plan and its public nominal number."""

    sample_rate: float
    noise_multiplier: float
    evaluation_noise_multiplier: Mapping[str, float]

    def training(self, steps: int) -> Spend:
        """The spend of ``steps`` training steps."""
        return Spend(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)

    def evaluation(self, part: str, releases: int = 1) -> Spend:
        """The spend of evaluating a part ``releases`` times."""
        sigma = self.evaluation_noise_multiplier[part]
        return Spend(noise_multiplier=sigma, sample_rate=1.0, steps=releases)


def sample_rate(plan: Plan, *, nominal_patients: int) -> float:
    """Returns q = min(1, B / nominal); never a function of the true number of patients.

    Of landmarks every patient takes part.
    """
    if plan.landmarks is not None:
        return 1.0
    return min(1.0, plan.training.expected_batch / nominal_patients)


@lru_cache(maxsize=1024)  # each task asks, and telling whether a target can be reached takes some ms
def mechanism(plan: Plan, *, nominal_patients: int) -> Mechanism:
    """Returns rate and noise of a site; patients of another part never see the same noise, so each part
    may cost the whole target (the parts are disjoint sets of patients).

    Raises:
        PrivacyTargetError: the target cannot be reached.
    """
    privacy = plan.privacy
    rate = sample_rate(plan, nominal_patients=nominal_patients)
    if not isinstance(privacy, DpSgd):
        return Mechanism(sample_rate=rate, noise_multiplier=0.0, evaluation_noise_multiplier={})
    require_reachable(plan, nominal_patients=nominal_patients)
    training = privacy.noise_multiplier or noise_multiplier(
        target_epsilon=privacy.target_epsilon or 0.0,
        delta=privacy.delta,
        sample_rate=rate,
        steps=plan.num_steps,
    )
    evaluation = evaluation_noise_multipliers(plan, nominal_patients=nominal_patients)
    return Mechanism(sample_rate=rate, noise_multiplier=training, evaluation_noise_multiplier=evaluation)


def evaluation_noise_multipliers(plan: Plan, *, nominal_patients: int) -> dict[str, float]:
    """Returns the noise multiplier of each part's histograms: the plan's, or that at which all releases of
    the part cost the run's target (what training costs, where the plan names a multiplier instead).

    Raises:
        PrivacyTargetError: the target cannot be reached.
    """
    privacy = plan.privacy
    assert isinstance(privacy, DpSgd)
    releases = {"validation": max(1, len(plan.validation_rounds)), "test": 1}
    if plan.evaluation.noise_multiplier is not None:
        return dict.fromkeys(releases, plan.evaluation.noise_multiplier)
    target = privacy.target_epsilon or _epsilon_of_training(plan, nominal_patients=nominal_patients)
    return {
        part: noise_multiplier(target_epsilon=target, delta=privacy.delta, sample_rate=1.0, steps=count)
        for part, count in releases.items()
    }


def _epsilon_of_training(plan: Plan, *, nominal_patients: int) -> float:
    """What the plan's training costs with the multiplier that the plan names."""
    assert isinstance(plan.privacy, DpSgd) and plan.privacy.noise_multiplier is not None
    rate = sample_rate(plan, nominal_patients=nominal_patients)
    spend = Spend(noise_multiplier=plan.privacy.noise_multiplier, sample_rate=rate, steps=plan.num_steps)
    return epsilon([spend], delta=plan.privacy.delta).value


def measure_noise_std(plan: Plan, *, nominal_patients: int, part: str) -> float:
    """Returns the standard deviation of the noise in each number that a site releases about a part.

    Site and server compute it, each for itself: it follows from public values, so nobody is asked for it.
    """
    multipliers = evaluation_noise_multipliers(plan, nominal_patients=nominal_patients)
    return multipliers[part] * measure.l2_sensitivity(plan.asked)


def landmark_noise_std(plan: Plan, *, nominal_patients: int) -> float:
    """Returns the standard deviation of the noise in each count of landmarks, as ``measure_noise_std``."""
    assert plan.landmarks is not None
    multiplier = mechanism(plan, nominal_patients=nominal_patients).noise_multiplier
    return multiplier * landmarks.l2_sensitivity(len(plan.landmarks.percentiles))


def run_spends(plan: Plan, *, nominal_patients: int, parts: Iterable[str]) -> dict[str, tuple[Spend, ...]]:
    """Returns all that a whole run will charge a site, by part; empty without privacy."""
    if not isinstance(plan.privacy, DpSgd):
        return {}
    chosen = mechanism(plan, nominal_patients=nominal_patients)
    spends = {
        "train": chosen.training(plan.num_steps),
        "validation": chosen.evaluation("validation", len(plan.validation_rounds)),
        "test": chosen.evaluation("test", int(plan.evaluation.test_at_end)),
    }
    return {part: merged([spends[part]]) for part in parts}
