"""How well scores rank: AUROC, ROC curve and the AUROC's confidence interval.

Everything here needs only the weight of negatives and positives at each distinct score (exact) or bin
(histogram), in ascending order.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from common.scores import Floats, Scores, Statistic, levels

# Values at which an interval's condition is tried: limits are exact to 0.00025.
INTERVAL_GRID_POINTS = 4001


def auroc(statistic: Statistic) -> float | None:
    """Returns the area under the ROC curve; ties count half; K > 2: mean over one-versus-rest heads.

    On a noised histogram the numerator (pairs in the right order) and the denominator (pairs) are
    unbiased, each being bilinear in two independently noised vectors; the ratio is clipped to [0, 1].
    Bins make ties: the value belongs to the binned score, at most a little below the exact one.
    """
    return _mean([_head_auroc(statistic, head) for head in _class_indices(statistic)])


def roc(statistic: Statistic, *, num_points: int = 201) -> list[tuple[float, float]]:
    """Returns (false positive rate, true positive rate), ascending from (0, 0) to (1, 1).

    Noise can make a cumulative count fall; the curve shown is the monotone one between its running
    maximum from the left and its running minimum from the right. K > 2: the mean curve over the
    one-versus-rest heads. Empty where the AUROC is undefined.
    """
    curves = [_head_roc(statistic, head) for head in _class_indices(statistic)]
    defined = [curve for curve in curves if curve is not None]
    if not defined:
        return []
    if len(defined) == 1 and defined[0].shape[1] <= num_points:
        return [(float(x), float(y)) for x, y in defined[0].T]
    grid = np.linspace(0.0, 1.0, num_points - 1)
    mean = np.mean([np.interp(grid, *curve) for curve in defined], axis=0)
    return [(0.0, 0.0), *((float(x), float(y)) for x, y in zip(grid, mean, strict=True))]


def interval(
    statistic: Statistic, *, noise_std: float = 0.0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Returns a confidence interval of the AUROC: both the choice of patients and the noise are in it.

    All values t are kept for which the sum over pairs of (in order - t), whose mean is zero at the true
    AUROC, lies within the normal quantile of its own standard deviation *at t*. Nothing is divided by a
    noisy count, so where noise drowns the cases the interval becomes (0, 1) instead of a narrow guess, and
    at an AUROC of 1 it does not collapse. Sampling variance: Hanley and McNeil's form with Newcombe's
    effective size, scaled up where DeLong's estimate is larger; the weight of a class is its number of
    independent patients (cautious for patients with several cases). Noise variance: estimated without bias
    from the noised counts. K > 2: heads see the same patients, so their sampling errors are added and only
    the noise averages out. Nothing is drawn at random.

    The interval is one of the AUROC of the binned score where the statistic is a histogram.

    Args:
        noise_std: standard deviation of the Gaussian noise in every count of this (merged) statistic; 0 for
            exact scores.
        confidence: two-sided, in (0, 1).

    Returns:
        Lower and upper limit, in [0, 1], or ``None`` where the AUROC is undefined.

    **Source:** Newcombe 2006, Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic, part 2; Hanley, McNeil 1982, The meaning and use of the area under a ROC curve; DeLong,
    DeLong, Clarke-Pearson 1988, Comparing the areas under two or more correlated ROC curves; Fieller 1954,
    Some problems in interval estimation (the inversion); Zou, Donner 2008, Construction of confidence
    limits about effect measures (the combination over heads).
    """
    if noise_std < 0 or not math.isfinite(noise_std):
        raise ValueError(f"expected a finite noise_std >= 0, found {noise_std}")
    if noise_std and isinstance(statistic, Scores):
        raise ValueError(f"expected noise_std=0 for exact scores, found {noise_std}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), found {confidence}")
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    limits = []
    for head in _class_indices(statistic):
        point = _head_auroc(statistic, head)
        if point is not None:
            weights = levels(statistic, head)
            both = _head_interval(weights, point, noise_std=noise_std, quantile=quantile)
            sampling = _head_interval(weights, point, noise_std=0.0, quantile=quantile)
            limits.append((point, both, sampling))
    return _combine(limits) if limits else None


def _class_indices(statistic: Statistic) -> range:
    """Heads over which ranking metrics are averaged: all but the top-1 head."""
    return range(max(1, statistic.num_heads - 1))


def _head_auroc(statistic: Statistic, head: int) -> float | None:
    negatives, positives = levels(statistic, head)
    if not (negatives.sum() > 0 and positives.sum() > 0):
        return None
    ordered = _ordered_pairs(negatives, positives) / float(negatives.sum() * positives.sum())
    return min(1.0, max(0.0, ordered))


def _ordered_pairs(negatives: Floats, positives: Floats) -> float:
    """Weight of the pairs in which the positive scores higher; ties count half."""
    return float(positives @ _below(negatives))


def _head_roc(statistic: Statistic, head: int) -> Floats | None:
    """Returns (2, points): false and true positive rates from (0, 0) to (1, 1)."""
    weights = levels(statistic, head)
    totals = weights.sum(axis=1, keepdims=True)
    if not (totals > 0).all():
        return None
    rates = np.cumsum(weights[:, ::-1], axis=1) / totals
    rising = np.maximum.accumulate(rates, axis=1)
    falling = np.minimum.accumulate(rates[:, ::-1], axis=1)[:, ::-1]
    inner = np.clip((rising + falling) / 2, 0.0, 1.0)
    return np.concatenate([np.zeros((2, 1)), inner[:, :-1], np.ones((2, 1))], axis=1)


def _head_interval(
    weights: Floats, point: float, *, noise_std: float, quantile: float
) -> tuple[float, float]:
    negatives, positives = weights
    pairs = float(negatives.sum() * positives.sum())
    values = np.linspace(0.0, 1.0, INTERVAL_GRID_POINTS)
    distance = _ordered_pairs(negatives, positives) - values * pairs
    sampling = pairs**2 * _model_variance(values, weights) * _excess(weights, point)
    variance = sampling + _noise_variance(values, weights, noise_std)
    kept = values[distance**2 <= quantile**2 * variance]
    low, high = (kept[0], kept[-1]) if kept.size else (point, point)
    return float(min(low, point)), float(max(high, point))


def _model_variance(values: Floats, weights: Floats) -> Floats:
    """Sampling variance of an AUROC if it were each of ``values`` (Newcombe's method 5)."""
    num_negatives, num_positives = weights.sum(axis=1)
    others = max((num_negatives + num_positives) / 2 - 1, 0.0)
    spread = 1 + others * ((1 - values) / (2 - values) + values / (1 + values))
    variance: Floats = values * (1 - values) * spread / (num_negatives * num_positives)
    return variance


def _excess(weights: Floats, point: float) -> float:
    """How much more the AUROC varies than the model says, judged by the data; at least 1."""
    expected = float(_model_variance(np.array([point]), weights)[0])
    return max(1.0, _placement_variance(weights) / expected) if expected > 0 else 1.0


def _placement_variance(weights: Floats) -> float:
    """Sampling variance as the data show it (DeLong), 0 where noise has made it negative."""
    negatives, positives = weights
    num_negatives, num_positives = negatives.sum(), positives.sum()
    of_positives = _below(negatives) / num_negatives
    of_negatives = 1 - _below(positives) / num_positives
    mean = float(positives @ of_positives / num_positives)
    spreads = [
        positives @ np.square(of_positives - mean) / num_positives / max(num_positives - 1, 1.0),
        negatives @ np.square(of_negatives - mean) / num_negatives / max(num_negatives - 1, 1.0),
    ]
    return sum(max(0.0, float(spread)) for spread in spreads)


def _noise_variance(values: Floats, weights: Floats, noise_std: float) -> Floats:
    """Variance that noise gives to the pair sum at each of ``values``.

    The pair sum is ``p' (K - t) n`` with K = 1, 1/2, 0 for pairs in order, tied, out of order. Noise of
    variance v in p and n adds ``v |(K - t) n|^2 + v |p' (K - t)|^2 + v^2 |K - t|^2``; squared norms of noised
    vectors are too large by ``v |K - t|^2`` each, hence the minus sign.
    """
    negatives, positives = weights
    bins, variance = negatives.size, noise_std**2
    of_positives = _squared_norm(_below(negatives), values * negatives.sum())
    of_negatives = _squared_norm(positives.sum() - _below(positives), values * positives.sum())
    kernel = bins * (bins - 1) / 2 + bins / 4 - values * bins**2 + values**2 * bins**2
    floor: Floats = variance**2 * kernel
    return np.maximum(variance * (of_positives + of_negatives) - floor, floor)


def _squared_norm(vector: Floats, shifts: Floats) -> Floats:
    """Returns ``|vector - shift|^2`` for each shift."""
    norms: Floats = np.square(vector).sum() - 2 * shifts * vector.sum() + vector.size * shifts**2
    return norms


def _below(weights: Floats) -> Floats:
    """Weight below each level; the level's own counts half."""
    below: Floats = np.cumsum(weights) - weights / 2
    return below


def _combine(limits: list[tuple[float, tuple[float, float], tuple[float, float]]]) -> tuple[float, float]:
    """Combines heads' (point, interval with noise, interval without) into the interval of their mean."""
    points = np.array([point for point, _, _ in limits])
    both = np.abs(np.array([interval for _, interval, _ in limits]) - points[:, None])
    sampling = np.abs(np.array([interval for _, _, interval in limits]) - points[:, None])
    noise = np.maximum(both**2 - sampling**2, 0.0)
    reach = np.sqrt(sampling.mean(axis=0) ** 2 + noise.sum(axis=0) / len(limits) ** 2)
    mean = float(points.mean())
    return max(0.0, mean - float(reach[0])), min(1.0, mean + float(reach[1]))


def _mean(values: list[float | None]) -> float | None:
    """Mean over what is defined: a class that no patient has says nothing about the ranking."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
