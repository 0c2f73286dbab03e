"""Metrics, computed from the statistics that sites release.

A metric that is undefined (a class is missing, nothing is left after noise) is ``None``, never NaN.
Ratios of noised counts are clipped to [0, 1].
"""

from __future__ import annotations

import numpy as np

from common.intervals import interval
from common.ranking import auroc, roc
from common.scores import (
    Histogram,
    Scores,
    Statistic,
    l2_sensitivity,
    merge,
    num_heads,
    patient_weights,
    score_statistics,
)
from common.thresholds import (
    accuracy,
    accuracy_interval,
    calibration_error,
    calibration_error_interval,
    sensitivity,
    sensitivity_interval,
    specificity,
    specificity_interval,
)

__all__ = [
    "Histogram",
    "Scores",
    "Statistic",
    "accuracy",
    "accuracy_interval",
    "auroc",
    "calibration_error",
    "calibration_error_interval",
    "interval",
    "l2_sensitivity",
    "log_loss",
    "merge",
    "num_heads",
    "patient_weights",
    "roc",
    "score_statistics",
    "sensitivity",
    "sensitivity_interval",
    "specificity",
    "specificity_interval",
]

# Half of a probability's float32 resolution at 1: a saturated wrong answer costs 16.6 nats, not infinity.
SMALLEST_PROB = float(np.finfo(np.float32).eps) / 2


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
