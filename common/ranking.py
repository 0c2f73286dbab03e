"""How well scores rank: AUROC and ROC curve.

Everything here needs only the weight of negatives and positives at each distinct score (exact) or bin
(histogram), in ascending order.

*Bins are not ties.* Counting two scores of one bin as tied reads a good model too low. The pairs of a bin
are instead ordered as the neighbouring bins suggest: with densities that change linearly within a bin, by
central differences, a pair in adjacent bins counts 13/12 when it is in order and -1/12 when it is not, and
all others 1, 1/2 or 0. This is the trapezoid of the ROC curve with the first correction of Euler and
Maclaurin; it stays bilinear in the counts, so noise does not bias it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.scores import Floats, Histogram, Statistic, levels

_NEIGHBOUR = 1 / 12
"""What a pair in adjacent bins counts beyond 1 when it is in order, and below 0 when it is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Weight of negatives and positives at each distinct score (``neighbour`` = 0) or in each bin."""

    negatives: Floats
    positives: Floats
    neighbour: float

    @classmethod
    def of(cls, statistic: Statistic, head: int) -> Classes:
        negatives, positives = levels(statistic, head)
        neighbour = _NEIGHBOUR if isinstance(statistic, Histogram) else 0.0
        return cls(negatives=negatives, positives=positives, neighbour=neighbour)

    @property
    def num_pairs(self) -> float:
        return float(self.negatives.sum() * self.positives.sum())

    @property
    def negatives_below(self) -> Floats:
        return _below(self.negatives, self.neighbour)

    @property
    def positives_below(self) -> Floats:
        return _below(self.positives, self.neighbour)

    @property
    def ordered_pairs(self) -> float:
        """Weight of the pairs in which the positive scores higher; ties count half."""
        return float(self.positives @ self.negatives_below)

    @property
    def from_neighbours(self) -> float:
        """How much of ``ordered_pairs`` is the correction for the width of the bins."""
        return self.ordered_pairs - float(self.positives @ _below(self.negatives, 0.0))


def auroc(statistic: Statistic) -> float | None:
    """Returns the area under the ROC curve; ties count half; K > 2: mean over one-versus-rest heads.

    On a noised histogram the numerator (pairs in the right order) and the denominator (pairs) are
    unbiased, each being bilinear in two independently noised vectors; the ratio is clipped to [0, 1].
    """
    return _mean([head_auroc(statistic, head) for head in class_indices(statistic)])


def auroc_by_class(statistic: Statistic) -> tuple[float | None, ...]:
    """Returns the AUROC of each class against the rest, or of each label; see ``auroc``."""
    return tuple(head_auroc(statistic, head) for head in class_indices(statistic))


def roc(statistic: Statistic, *, num_points: int = 201) -> list[tuple[float, float]]:
    """Returns (false positive rate, true positive rate), ascending from (0, 0) to (1, 1).

    A histogram's curve is drawn straight from edge to edge of its bins, so the area below it is a little
    less than the AUROC.

    Noise can make a cumulative count fall; the curve shown is the monotone one between its running
    maximum from the left and its running minimum from the right. K > 2: the mean curve over the
    one-versus-rest heads. Empty where the AUROC is undefined.
    """
    curves = [_head_roc(statistic, head) for head in class_indices(statistic)]
    defined = [curve for curve in curves if curve is not None]
    if not defined:
        return []
    if len(defined) == 1 and defined[0].shape[1] <= num_points:
        return [(float(x), float(y)) for x, y in defined[0].T]
    grid = np.linspace(0.0, 1.0, num_points - 1)
    mean = np.mean([np.interp(grid, *curve) for curve in defined], axis=0)
    return [(0.0, 0.0), *((float(x), float(y)) for x, y in zip(grid, mean, strict=True))]


def class_indices(statistic: Statistic) -> range:
    """Heads over which ranking metrics are averaged: all but the top-1 head."""
    return range(max(1, statistic.num_heads - 1))


def head_auroc(statistic: Statistic, head: int) -> float | None:
    classes = Classes.of(statistic, head)
    if not (classes.negatives.sum() > 0 and classes.positives.sum() > 0):
        return None
    return min(1.0, max(0.0, classes.ordered_pairs / classes.num_pairs))


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


def _below(weights: Floats, neighbour: float) -> Floats:
    """Weight below each level; the level's own counts half, neighbours' as the module says."""
    padded = np.concatenate([[0.0], weights, [0.0]])
    below: Floats = np.cumsum(weights) - weights / 2 + neighbour * (padded[:-2] - padded[2:])
    return below


def _mean(values: list[float | None]) -> float | None:
    """Mean over what is defined: a class that no patient has says nothing about the ranking."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
