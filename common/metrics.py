"""Metrics, computed from the statistics that sites release.

A metric that is undefined (a class is missing, nothing is left after noise) is ``None``, never NaN.
Ratios of noised counts are clipped to [0, 1].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.ranking import auroc, interval, roc
from common.scores import (
    NEGATIVES,
    POSITIVES,
    Floats,
    Histogram,
    Scores,
    Statistic,
    l2_sensitivity,
    levels,
    merge,
    num_heads,
    patient_weights,
    score_statistics,
)

__all__ = [
    "Histogram",
    "Scores",
    "Statistic",
    "accuracy",
    "auroc",
    "calibration_error",
    "interval",
    "l2_sensitivity",
    "log_loss",
    "merge",
    "num_heads",
    "patient_weights",
    "roc",
    "score_statistics",
    "sensitivity",
    "specificity",
]

# Half of a probability's float32 resolution at 1: a saturated wrong answer costs 16.6 nats, not infinity.
SMALLEST_PROB = float(np.finfo(np.float32).eps) / 2


def accuracy(statistic: Statistic) -> float | None:
    """Returns the fraction of right answers: threshold 0.5 for two classes, top-1 for more."""
    if statistic.num_heads > 1:
        wrong, correct = levels(statistic, statistic.num_heads - 1).sum(axis=1)
        return _fraction(correct, wrong + correct)
    below, above = _around_half(statistic)
    return _fraction(below[NEGATIVES] + above[POSITIVES], float(below.sum() + above.sum()))


def sensitivity(statistic: Statistic) -> float | None:
    """Returns the fraction of positives scored 0.5 or more; ``None`` for more than two classes."""
    if statistic.num_heads > 1:
        return None
    below, above = _around_half(statistic)
    return _fraction(above[POSITIVES], below[POSITIVES] + above[POSITIVES])


def specificity(statistic: Statistic) -> float | None:
    """Returns the fraction of negatives scored below 0.5; ``None`` for more than two classes."""
    if statistic.num_heads > 1:
        return None
    below, above = _around_half(statistic)
    return _fraction(below[NEGATIVES], below[NEGATIVES] + above[NEGATIVES])


def calibration_error(statistic: Statistic, *, noise_std: float = 0.0, bins: int = 10) -> float | None:
    """Returns the expected calibration error: how far stated and observed frequency differ, on average.

    Of P(class 1) for two classes, of the top-1 confidence for more. Exact scores are put in ``bins`` bins
    and compared with their mean score; a histogram's bins are taken at their centre, which is exact to
    half a bin's width. The part of a squared gap that noise of ``noise_std`` explains is taken off.

    Source: Naeini, Cooper, Hauskrecht 2015, Obtaining well calibrated probabilities using Bayesian binning.
    """
    head = statistic.num_heads - 1
    if isinstance(statistic, Scores):
        counts, stated = _binned_scores(statistic, head=head, bins=bins)
        noise_variance: Floats | float = 0.0
    else:
        counts = statistic.counts[head]
        centres = (np.arange(statistic.num_bins) + 0.5) / statistic.num_bins
        stated = centres * counts.sum(axis=0)
        noise_variance = noise_std**2 * (centres**2 + (1 - centres) ** 2)
    gaps = np.sqrt(np.maximum((stated - counts[POSITIVES]) ** 2 - noise_variance, 0.0))
    return _fraction(float(gaps.sum()), float(counts.sum()))


def log_loss(statistic: Statistic) -> float | None:
    """Returns the mean cross-entropy in nats; ``None`` for a histogram, which does not know it."""
    if isinstance(statistic, Histogram) or not statistic.weights.sum() > 0:
        return None
    probs = statistic.scores.astype(np.float64)
    if statistic.num_heads == 1:
        of_truth = np.where(statistic.targets[:, 0] == 1, probs[:, 0], 1 - probs[:, 0])
    else:
        of_truth = (probs * statistic.targets)[:, :-1].sum(axis=1)
    losses = -np.log(np.maximum(of_truth, SMALLEST_PROB))
    return float(np.average(losses, weights=statistic.weights))


def _around_half(statistic: Statistic) -> tuple[Floats, Floats]:
    """Returns the weight (negatives, positives) scored below 0.5, and at 0.5 or above.

    With an odd number of bins 0.5 lies inside the middle bin, which is then split in halves: an
    estimate, exact only if scores are spread evenly within that bin.
    """
    if isinstance(statistic, Scores):
        above = statistic.scores[:, 0] >= 0.5
        return _class_weights(statistic, ~above), _class_weights(statistic, above)
    counts, half = statistic.counts[0], statistic.num_bins // 2
    below, above_half = counts[:, :half].sum(axis=1), counts[:, -half:].sum(axis=1)
    middle = counts[:, half] / 2 if statistic.num_bins % 2 else np.zeros(2)
    return below + middle, above_half + middle


def _class_weights(statistic: Scores, cases: npt.NDArray[np.bool_]) -> Floats:
    """Returns the weight of negatives and positives of the first head among ``cases``."""
    weights = np.zeros(2)
    np.add.at(weights, statistic.targets[cases, 0], statistic.weights[cases])
    return weights


def _binned_scores(statistic: Scores, *, head: int, bins: int) -> tuple[Floats, Floats]:
    """Returns the counts (2, bins) and the summed scores (bins,) of one head."""
    scores = statistic.scores[:, head].astype(np.float64)
    index = np.minimum((scores * bins).astype(np.int64), bins - 1)
    stated = np.zeros(bins)
    np.add.at(stated, index, scores * statistic.weights)
    return statistic.histogram(bins).counts[head], stated


def _fraction(part: float, whole: float) -> float | None:
    """A ratio clipped to [0, 1]; noise can push it out. ``None`` where there is nothing to divide by."""
    return min(1.0, max(0.0, float(part) / float(whole))) if whole > 0 else None
