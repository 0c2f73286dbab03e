"""Metrics, computed from the statistics that sites release.

A metric that is undefined (a class is missing, nothing is left after noise) is ``None``, never NaN.
Ratios of noised counts are clipped to [0, 1].
"""

from __future__ import annotations

import numpy as np

from common.intervals import interval
from common.ranking import auroc, auroc_by_class, roc
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
    "auroc_by_class",
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


def log_loss(statistic: Statistic, *, several_labels: bool = False) -> float | None:
    """Returns the mean cross-entropy in nats; ``None`` for a histogram, which does not know it.

    Args:
        several_labels: a case may bear any number of labels; the loss is then the mean over labels.
    """
    if isinstance(statistic, Histogram) or not statistic.weights.sum() > 0:
        return None
    probs = statistic.scores.astype(np.float64)
    heads = slice(None, 1 if statistic.num_heads == 1 else -1)
    if statistic.num_heads == 1 or several_labels:
        of_truth = np.where(statistic.targets == 1, probs, 1 - probs)[:, heads]
    else:
        of_truth = (probs * statistic.targets)[:, heads].sum(axis=1, keepdims=True)
    losses = -np.log(np.maximum(of_truth, SMALLEST_PROB)).mean(axis=1)
    return float(np.average(losses, weights=statistic.weights))
