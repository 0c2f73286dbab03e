"""Right and wrong answers, and how far stated probabilities are off, each with a confidence interval.

Every rate here is a share of the cells of a small table of counts: each cell lies in the part (1), outside
(0), or is split in halves where 0.5 is inside a bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.bins import bin_centres, bin_indices
from common.intervals import INTERVAL_GRID_POINTS, normal_quantile
from common.scores import (
    NEGATIVES,
    POSITIVES,
    Floats,
    Histogram,
    Scores,
    Statistic,
    levels,
)

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rate:
    """``counts`` float64, (cells,), noised or exact; ``shares`` (cells,): how much is in the part."""

    counts: Floats
    shares: Floats

    @property
    def value(self) -> float | None:
        return fraction(float(self.counts @ self.shares), float(self.counts.sum()))


def accuracy(statistic: Statistic) -> float | None:
    """Returns the fraction of right answers: threshold 0.5 for two classes, top-1 for more."""
    return _value(_accuracy(statistic))


def sensitivity(statistic: Statistic) -> float | None:
    """Returns the fraction of positives scored 0.5 or more; ``None`` for more than two classes."""
    return _value(_sensitivity(statistic))


def specificity(statistic: Statistic) -> float | None:
    """Returns the fraction of negatives scored below 0.5; ``None`` for more than two classes."""
    return _value(_specificity(statistic))


def accuracy_interval(
    statistic: Statistic, *, noise_std: float = 0.0, confidence: float = 0.95
) -> Interval | None:
    """Returns a confidence interval of the accuracy; see ``rate_interval``."""
    return _interval(_accuracy, statistic, noise_std, confidence)


def sensitivity_interval(
    statistic: Statistic, *, noise_std: float = 0.0, confidence: float = 0.95
) -> Interval | None:
    """Returns a confidence interval of the sensitivity; see ``rate_interval``."""
    return _interval(_sensitivity, statistic, noise_std, confidence)


def specificity_interval(
    statistic: Statistic, *, noise_std: float = 0.0, confidence: float = 0.95
) -> Interval | None:
    """Returns a confidence interval of the specificity; see ``rate_interval``."""
    return _interval(_specificity, statistic, noise_std, confidence)


def rate_interval(counts: Floats, shares: Floats, *, noise_std: float, quantile: float) -> Interval:
    """Returns the rates t at which ``sum(counts * (shares - t))``, of mean zero, is within its spread at t.

    Without noise this is Wilson's interval; noise of variance v adds ``v |shares - t|^2``. Where noise
    drowns the counts, the interval is (0, 1). A patient with several cases counts as one, which is cautious.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference; Fieller 1954.
    """
    values = np.linspace(0.0, 1.0, INTERVAL_GRID_POINTS)
    total = float(counts.sum())
    distance = float(counts @ shares) - values * total
    noise = noise_std**2 * np.square(shares[:, None] - values).sum(axis=0)
    kept = values[distance**2 <= quantile**2 * (total * values * (1 - values) + noise)]
    point = fraction(float(counts @ shares), total) or 0.0
    low, high = (kept[0], kept[-1]) if kept.size else (point, point)
    return float(min(low, point)), float(max(high, point))


def calibration_error(statistic: Statistic, *, bins: int, noise_std: float = 0.0) -> float | None:
    """Returns the expected calibration error: how far stated and observed frequency differ, on average.

    Of P(class 1) for two classes, of the top-1 confidence for more. Exact scores are put in ``bins`` bins
    and compared with their mean score; a histogram has its bins, which stand for their centres, exact to
    half a bin's width. The part of a squared gap that noise of ``noise_std`` explains is taken off.

    Source: Naeini, Cooper, Hauskrecht 2015, Obtaining well calibrated probabilities using Bayesian binning.
    """
    counts, stated, centres = _calibration(statistic, bins)
    noise_variance = noise_std**2 * (centres**2 + (1 - centres) ** 2)
    gaps = np.sqrt(np.maximum((stated - counts[POSITIVES]) ** 2 - noise_variance, 0.0))
    return fraction(float(gaps.sum()), float(counts.sum()))


def calibration_error_interval(
    statistic: Statistic, *, bins: int, noise_std: float = 0.0, confidence: float = 0.95
) -> Interval | None:
    """Returns a confidence interval of ``calibration_error``, wider than need be.

    The summed gaps of a sample are larger than the true ones by at most sqrt(2 / pi) of the standard
    deviation of each, so the lower limit is moved down by that. Kept is every value t at which
    t times the patients is within reach of the summed gaps, with their spread and that of the number
    of patients added, not their variances.
    """
    quantile = normal_quantile(statistic, noise_std=noise_std, confidence=confidence)
    counts, stated, centres = _calibration(statistic, bins)
    total = float(counts.sum())
    if not total > 0:
        return None
    sizes = np.maximum(counts.sum(axis=0), 0.0)
    share = np.clip((np.maximum(counts[POSITIVES], 0.0) + 1) / (sizes + 2), 0.0, 1.0)
    variance = sizes * share * (1 - share) + noise_std**2 * (centres**2 + (1 - centres) ** 2)
    summed = float(np.abs(stated - counts[POSITIVES]).sum())
    excess = math.sqrt(2 / math.pi) * float(np.sqrt(variance).sum())
    values = np.linspace(0.0, 1.0, INTERVAL_GRID_POINTS)
    reach = quantile * (math.sqrt(float(variance.sum())) + values * noise_std * math.sqrt(counts.size))
    is_kept = (values * total >= summed - excess - reach) & (values * total <= summed + reach)
    point = calibration_error(statistic, bins=bins, noise_std=noise_std) or 0.0
    kept = np.append(values[is_kept], point)
    return float(kept.min()), float(kept.max())


def fraction(part: float, whole: float) -> float | None:
    """A ratio clipped to [0, 1]; noise can push it out. ``None`` where there is nothing to divide by."""
    return min(1.0, max(0.0, float(part) / float(whole))) if whole > 0 else None


def _accuracy(statistic: Statistic) -> _Rate:
    if statistic.num_heads > 1:
        counts = levels(statistic, statistic.num_heads - 1)
        return _Rate(counts=counts.ravel(), shares=np.repeat([0.0, 1.0], counts.shape[1]))
    counts, above = _around_half(statistic)
    return _Rate(counts=counts.ravel(), shares=np.concatenate([1 - above, above]))


def _sensitivity(statistic: Statistic) -> _Rate | None:
    if statistic.num_heads > 1:
        return None
    counts, above = _around_half(statistic)
    return _Rate(counts=counts[POSITIVES], shares=above)


def _specificity(statistic: Statistic) -> _Rate | None:
    if statistic.num_heads > 1:
        return None
    counts, above = _around_half(statistic)
    return _Rate(counts=counts[NEGATIVES], shares=1 - above)


def _value(rate: _Rate | None) -> float | None:
    return None if rate is None else rate.value


def _interval(
    rate_of: Callable[[Statistic], _Rate | None], statistic: Statistic, noise_std: float, confidence: float
) -> Interval | None:
    quantile = normal_quantile(statistic, noise_std=noise_std, confidence=confidence)
    rate = rate_of(statistic)
    if rate is None or rate.value is None:
        return None
    return rate_interval(rate.counts, rate.shares, noise_std=noise_std, quantile=quantile)


def _around_half(statistic: Statistic) -> tuple[Floats, Floats]:
    """Returns counts (2, cells) of the first head and the share (cells,) of each that scored 0.5 or more.

    With an odd number of bins 0.5 lies inside the middle bin, which is then split in halves: an
    estimate, exact only if scores are spread evenly within that bin.
    """
    if isinstance(statistic, Histogram):
        bins = statistic.num_bins
        above = np.clip(np.arange(bins) + 1 - bins / 2, 0.0, 1.0)
        return statistic.counts[0], above
    is_above = statistic.scores[:, 0] >= 0.5
    counts = np.stack([_class_weights(statistic, cases) for cases in (~is_above, is_above)], axis=1)
    return counts, np.array([0.0, 1.0])


def _class_weights(statistic: Scores, cases: npt.NDArray[np.bool_]) -> Floats:
    """Returns the weight of negatives and positives of the first head among ``cases``."""
    weights = np.zeros(2)
    np.add.at(weights, statistic.targets[cases, 0], statistic.weights[cases])
    return weights


def _calibration(statistic: Statistic, bins: int) -> tuple[Floats, Floats, Floats]:
    """Returns counts (2, bins) of the last head, and the summed scores and the centre of each bin."""
    head = statistic.num_heads - 1
    if isinstance(statistic, Histogram):
        centres = bin_centres(statistic.num_bins)
        return statistic.counts[head], centres * statistic.counts[head].sum(axis=0), centres
    scores = statistic.scores[:, head].astype(np.float64)
    stated = np.zeros(bins)
    np.add.at(stated, bin_indices(scores, bins), scores * statistic.weights)
    return statistic.histogram(bins).counts[head], stated, bin_centres(bins)
