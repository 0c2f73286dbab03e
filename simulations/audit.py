"""A lower bound of epsilon from guesses about canaries, all of them from one run.

Each of many canary patients is in the data or not by a coin of its own. Somebody who sees what was released
guesses some of the coins. A mechanism that is (epsilon, delta)-DP bounds how many guesses can be right; more
of them than that refute the epsilon.

Source: Steinke, Nasr and Jagielski (2023), Privacy Auditing with One (1) Training Run, Theorem 5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_GRID = 0.25  # epsilon is searched upward in steps of it, so that the first value not refuted is found
_PRECISION = 1e-4
_LARGEST_EPSILON = 50.0


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How often somebody was right about canaries; about the others they said nothing."""

    num_canaries: int
    num_guesses: int
    num_right: int


def guess(scores: NDArray[np.floating], included: NDArray[np.bool_], *, num_guesses: int) -> Guesses:
    """Guesses that the canaries with the highest scores were in the data, and those with the lowest not.

    Args:
        scores: float, (num_canaries,); higher for canaries that are in the data.
        included: bool, (num_canaries,); the coins.
        num_guesses: half of them "in", half "out". Chosen before the scores are seen.
    """
    half = num_guesses // 2
    order = np.argsort(scores, kind="stable")
    right = int(included[order[len(order) - half :]].sum() + (~included[order[:half]]).sum())
    return Guesses(num_canaries=len(scores), num_guesses=2 * half, num_right=right)


def p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Returns the probability, or a bound of it, of so many right guesses under (epsilon, delta)-DP.

    Guarantee: holds for every mechanism that is (epsilon, delta)-DP under adding or removing one canary,
    whatever the guesses are made from, if the coins are fair and independent and the number of guesses does
    not depend on them. The guesses need not be independent of each other.

    ==========================  ===========================================
    case                        result
    ==========================  ===========================================
    no right guess              1
    delta = 0                   the upper tail of Binomial(guesses, e^epsilon / (1 + e^epsilon))
    delta > 0                   the same, and 2 num_canaries delta times the steepest mean slope below it
    ==========================  ===========================================

    >>> round(p_value(Guesses(num_canaries=9, num_guesses=9, num_right=9), epsilon=0.0, delta=0.0) * 2**9, 9)
    1.0
    """
    right = guesses.num_right
    if right == 0:
        return 1.0
    probabilities = _binomial(guesses.num_guesses, epsilon)
    tail = float(probabilities[right:].sum())
    below = np.cumsum(probabilities[:right][::-1])  # P[right > W >= right - i] for i = 1, 2, ...
    slope = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * guesses.num_canaries * delta * slope)


def lower_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """Returns the epsilon up to which the guesses refute (epsilon, delta)-DP.

    Guarantee: of a mechanism that is (epsilon, delta)-DP the bound exceeds epsilon with probability at most
    ``1 - confidence``; see ``p_value``.

    All of 100 guesses right, delta = 0: the epsilon at which that happens with probability 5 %.

    >>> all_right = Guesses(num_canaries=100, num_guesses=100, num_right=100)
    >>> round(lower_bound(all_right, delta=0, confidence=0.95), 3)
    3.493
    >>> half_right = Guesses(num_canaries=100, num_guesses=100, num_right=50)
    >>> lower_bound(half_right, delta=0, confidence=0.95)
    0.0
    """

    def is_refuted(epsilon: float) -> bool:
        return p_value(guesses, epsilon=epsilon, delta=delta) < 1 - confidence

    if not is_refuted(0.0):
        return 0.0
    low = 0.0
    while is_refuted(low + _GRID) and low < _LARGEST_EPSILON:
        low += _GRID
    high = low + _GRID
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def _binomial(trials: int, epsilon: float) -> Floats:
    """Returns the probabilities of 0 to ``trials`` successes of an epsilon-DP randomised response."""
    successes = np.arange(trials + 1)
    right, wrong = -math.log1p(math.exp(-epsilon)), -math.log1p(math.exp(epsilon))
    probabilities: Floats = np.exp(_log_choose(trials) + successes * right + (trials - successes) * wrong)
    return probabilities


@lru_cache(maxsize=64)
def _log_choose(trials: int) -> Floats:
    logs = np.array([math.lgamma(count + 1) for count in range(trials + 1)])
    choose: Floats = logs[-1] - logs - logs[::-1]
    return choose
