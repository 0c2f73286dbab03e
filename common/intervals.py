"""The AUROC's confidence interval: the choice of patients and the noise are both in it.

Nothing is drawn at random.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from common.ranking import Classes, class_indices, head_auroc
from common.scores import Floats, Scores, Statistic

# Values at which an interval's condition is tried: limits are exact to 0.00025.
INTERVAL_GRID_POINTS = 4001


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

    For a histogram the limit on the far side of 1/2 is moved out by as much as the correction for the width
    of the bins is, since what such a correction leaves is of unknown size but smaller, as long as the
    scores spread over several bins. Where they all lie in two or three, the truth may be outside.

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
    quantile = normal_quantile(statistic, noise_std=noise_std, confidence=confidence)
    limits = []
    for head in class_indices(statistic):
        point = head_auroc(statistic, head)
        if point is not None:
            classes = Classes.of(statistic, head)
            both = _head_interval(classes, point, noise_std=noise_std, quantile=quantile)
            sampling = _head_interval(classes, point, noise_std=0.0, quantile=quantile)
            limits.append((point, both, sampling))
    return _combine(limits) if limits else None


def normal_quantile(statistic: Statistic, *, noise_std: float, confidence: float) -> float:
    """Returns how many standard deviations a two-sided interval reaches.

    Raises:
        ValueError: an impossible noise or confidence.
    """
    if noise_std < 0 or not math.isfinite(noise_std):
        raise ValueError(f"expected a finite noise_std >= 0, found {noise_std}")
    if noise_std and isinstance(statistic, Scores):
        raise ValueError(f"expected noise_std=0 for exact scores, found {noise_std}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), found {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _head_interval(
    classes: Classes, point: float, *, noise_std: float, quantile: float
) -> tuple[float, float]:
    pairs = classes.num_pairs
    values = np.linspace(0.0, 1.0, INTERVAL_GRID_POINTS)
    # Noise may put more pairs in order than there are; to move the sum to what is possible brings it nearer
    # to the truth, whatever that is, and keeps the interval from shrinking to nothing.
    distance = np.clip(classes.ordered_pairs, 0.0, pairs) - values * pairs
    sampling = pairs**2 * _model_variance(values, classes) * _excess(classes, point)
    variance = sampling + _noise_variance(values, classes, noise_std)
    kept = values[distance**2 <= quantile**2 * variance]
    low, high = (kept[0], kept[-1]) if kept.size else (point, point)
    coarse = classes.from_neighbours / pairs
    low, high = min(low, point) + min(0.0, coarse), max(high, point) + max(0.0, coarse)
    return max(0.0, float(low)), min(1.0, float(high))


def _model_variance(values: Floats, classes: Classes) -> Floats:
    """Sampling variance of an AUROC if it were each of ``values`` (Newcombe's method 5)."""
    num_negatives, num_positives = classes.negatives.sum(), classes.positives.sum()
    others = max((num_negatives + num_positives) / 2 - 1, 0.0)
    spread = 1 + others * ((1 - values) / (2 - values) + values / (1 + values))
    variance: Floats = values * (1 - values) * spread / (num_negatives * num_positives)
    return variance


def _excess(classes: Classes, point: float) -> float:
    """How much more the AUROC varies than the model says, judged by the data; at least 1."""
    expected = float(_model_variance(np.array([point]), classes)[0])
    return max(1.0, _placement_variance(classes) / expected) if expected > 0 else 1.0


def _placement_variance(classes: Classes) -> float:
    """Sampling variance as the data show it (DeLong), 0 where noise has made it negative."""
    negatives, positives = classes.negatives, classes.positives
    num_negatives, num_positives = negatives.sum(), positives.sum()
    of_positives = classes.negatives_below / num_negatives
    of_negatives = 1 - classes.positives_below / num_positives
    mean = float(positives @ of_positives / num_positives)
    spreads = [
        positives @ np.square(of_positives - mean) / num_positives / max(num_positives - 1, 1.0),
        negatives @ np.square(of_negatives - mean) / num_negatives / max(num_negatives - 1, 1.0),
    ]
    return sum(max(0.0, float(spread)) for spread in spreads)


def _noise_variance(values: Floats, classes: Classes, noise_std: float) -> Floats:
    """Variance that noise gives to the pair sum at each of ``values``.

    The pair sum is ``p' (K - t) n`` with K = 1, 1/2, 0 for pairs in order, in one bin, out of order, and a
    twelfth beyond 1 and 0 in adjacent bins. Noise of variance v in p and n adds
    ``v |(K - t) n|^2 + v |p' (K - t)|^2 + v^2 |K - t|^2``; squared norms of noised vectors are too large by
    ``v |K - t|^2`` each, hence the minus sign.
    """
    negatives, positives = classes.negatives, classes.positives
    bins, variance = negatives.size, noise_std**2
    of_positives = _squared_norm(classes.negatives_below, values * negatives.sum())
    of_negatives = _squared_norm(positives.sum() - classes.positives_below, values * positives.sum())
    beyond = 2 * (bins - 1) * classes.neighbour * (1 + classes.neighbour)
    kernel = bins * (bins - 1) / 2 + bins / 4 + beyond - values * bins**2 + values**2 * bins**2
    floor: Floats = variance**2 * kernel
    return np.maximum(variance * (of_positives + of_negatives) - floor, floor)


def _squared_norm(vector: Floats, shifts: Floats) -> Floats:
    """Returns ``|vector - shift|^2`` for each shift."""
    norms: Floats = np.square(vector).sum() - 2 * shifts * vector.sum() + vector.size * shifts**2
    return norms


def _combine(limits: list[tuple[float, tuple[float, float], tuple[float, float]]]) -> tuple[float, float]:
    """Combines heads' (point, interval with noise, interval without) into the interval of their mean."""
    points = np.array([point for point, _, _ in limits])
    both = np.abs(np.array([interval for _, interval, _ in limits]) - points[:, None])
    sampling = np.abs(np.array([interval for _, _, interval in limits]) - points[:, None])
    noise = np.maximum(both**2 - sampling**2, 0.0)
    reach = np.sqrt(sampling.mean(axis=0) ** 2 + noise.sum(axis=0) / len(limits) ** 2)
    mean = float(points.mean())
    return max(0.0, mean - float(reach[0])), min(1.0, mean + float(reach[1]))
