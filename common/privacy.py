"""Accounting: from a history of noisy releases to epsilon.

Everything here is a function of public values; nothing reads data or state.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

WHOLE_ORDERS: Final = [float(order) for order in (*range(2, 64), 80, 128, 256, 512, 1024)]
_EPSILON_ERROR_FRACTION = 3e-3  # what the PRV accountant may overstate epsilon by, relative to epsilon
_LEAST_ERROR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Spend:
    """``steps`` Gaussian releases, each of Poisson-sampled patients.

    ``noise_multiplier``: standard deviation of the noise over the L2 sensitivity. ``sample_rate``:
    probability that a patient is in a step; 1 for a release of every patient.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """An upper bound and the accountant that proved it: ``gaussian`` (exact), ``prv`` or ``rdp``."""

    value: float
    accountant: str


def merged(history: Iterable[Spend]) -> tuple[Spend, ...]:
    """Adds up the steps of equal releases; the order of the result is fixed."""
    steps: Counter[tuple[float, float]] = Counter()
    for spend in history:
        steps[spend.noise_multiplier, spend.sample_rate] += spend.steps
    return tuple(
        Spend(noise_multiplier=noise, sample_rate=rate, steps=count)
        for (noise, rate), count in sorted(steps.items())
        if count > 0
    )


def epsilon(history: Iterable[Spend], *, delta: float) -> Epsilon:
    """Returns the epsilon that the whole history costs at ``delta``, cumulative over all of it.

    Guarantee: (epsilon, delta)-DP at patient level under add/remove of one patient, if every step sampled
    patients independently at ``sample_rate`` and its noise was drawn as stated.

    ============================  =========================
    history                       result
    ============================  =========================
    empty, or steps = 0           0
    only sample_rate = 1          exact (Balle and Wang)
    else                          PRV, or RDP where PRV fails
    ============================  =========================

    Source: Balle and Wang (2018), Improving the Gaussian Mechanism; Gopi, Lee and Wutschitz (2021),
    Numerical Composition of Differential Privacy; Mironov, Talwar and Zhang (2019).

    >>> round(epsilon([Spend(noise_multiplier=1.0, sample_rate=1.0, steps=1)], delta=1e-5).value, 3)
    4.377
    """
    return _epsilon(merged(history), delta)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Spend, ...], delta: float) -> Epsilon:
    if not history:
        return Epsilon(value=0.0, accountant="gaussian")
    if all(spend.sample_rate == 1.0 for spend in history):
        mu = math.sqrt(sum(spend.steps / spend.noise_multiplier**2 for spend in history))
        return Epsilon(value=_gaussian_epsilon(mu, delta), accountant="gaussian")
    rdp = _rdp_epsilon(history, delta)
    try:
        prv = _prv_epsilon(history, delta, error=max(_LEAST_ERROR, rdp * _EPSILON_ERROR_FRACTION))
        finer = max(_LEAST_ERROR, prv * _EPSILON_ERROR_FRACTION)
        if prv < rdp / 1.3:  # the error was a larger part of epsilon than it may be
            prv = min(prv, _prv_epsilon(history, delta, error=finer))
    except (RuntimeError, ValueError, OverflowError, MemoryError):
        prv = math.inf  # the grid of the numerical composition does not exist for extreme values
    if 0 <= prv <= rdp:
        return Epsilon(value=prv, accountant="prv")
    return Epsilon(value=rdp, accountant="rdp")


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon of a mu-Gaussian-DP mechanism at delta (Dong, Roth and Su 2022, Corollary 2.13)."""
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_delta(mu: float, eps: float) -> float:
    """Returns the delta at which a mu-Gaussian-DP mechanism costs ``eps`` (Dong, Roth and Su 2022)."""
    second = _normal_cdf(-eps / mu - mu / 2)
    return _normal_cdf(-eps / mu + mu / 2) - (math.exp(eps + math.log(second)) if second > 0 else 0.0)


def _normal_cdf(x: float) -> float:
    """By erfc: far out ``statistics.NormalDist`` has steps of 6e-17, too coarse to take times exp(eps)."""
    return math.erfc(-x / math.sqrt(2)) / 2


def _prv_epsilon(history: tuple[Spend, ...], delta: float, *, error: float) -> float:
    from opacus.accountants import PRVAccountant  # seconds to import, so only where needed

    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in history]
    with warnings.catch_warnings():
        # its search for a grid asks for RDP at orders of its own and warns when the last one is best
        warnings.simplefilter("ignore")
        value = float(accountant.get_epsilon(delta=delta, eps_error=error))
    return value if math.isfinite(value) else math.inf


def _rdp_epsilon(history: tuple[Spend, ...], delta: float) -> float:
    fractions = [1 + x / 10.0 for x in range(1, 100)]
    return rdp_bound(history, delta, orders=sorted({*fractions, *WHOLE_ORDERS}))


def rdp_bound(history: tuple[Spend, ...], delta: float, *, orders: list[float]) -> float:
    """The best of the bounds of some orders; whole ones cost a tenth of the time of fractions."""
    from opacus.accountants.analysis import rdp  # seconds to import, so only where needed

    total = sum(
        rdp.compute_rdp(
            q=spend.sample_rate, noise_multiplier=spend.noise_multiplier, steps=spend.steps, orders=orders
        )
        for spend in history
    )
    terms = [
        (float(cost) - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order))
        for cost, order in zip(total, orders, strict=True)
    ]
    return max(0.0, min(terms))


def worst_epsilon(by_part: dict[str, tuple[Spend, ...]], *, delta: float) -> Epsilon:
    """Returns the largest epsilon over disjoint parts: a patient is in one part only."""
    bounds = [epsilon(history, delta=delta) for history in by_part.values()]
    return max(bounds, key=lambda bound: bound.value, default=Epsilon(value=0.0, accountant="gaussian"))
