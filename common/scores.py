"""Mergeable statistics of scores: what a site releases of an evaluation.

A site evaluates the model and releases one of two statistics: a ``Histogram``, to which it has added
noise, or, where nothing needs protection, the exact ``Scores``. Statistics of several sites merge by
addition or concatenation; ``common/metrics.py`` computes the metrics.

*Heads.* A task of two classes has one head, P(class 1). A task of K > 2 classes has K one-versus-rest
heads (score: softmax probability of class k) and one last head with the top-1 confidence, whose
positives are the correct answers (accuracy and calibration come from there). A task of K labels, of which
a case may bear any, has a head for each label (score: sigmoid) and a last head with the product of the
labels' confidences, whose positives are the cases of which every label is right.

*Weights.* The cases of one patient weigh 1 together, so a patient with many images counts once and the
statistic's sensitivity does not depend on the number of images.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.bins import bin_indices

Floats = npt.NDArray[np.float64]

NEGATIVES, POSITIVES = 0, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """Scores by head, class and bin; exact, or with noise added to every count.

    Attributes:
        counts: float64, (heads, 2, bins); index 0 of the second axis holds the negatives, 1 the positives.
            Bins are those of ``bin_indices``; a score on an edge belongs to the bin above.
            Counts are sums of patient weights; noise may make them fractional and negative.

    Raises:
        ValueError: wrong shape or a count that is not finite.
    """

    counts: Floats

    def __post_init__(self) -> None:
        counts = _read_only(self.counts, np.float64)
        if counts.ndim != 3 or counts.shape[0] < 1 or counts.shape[1] != 2 or counts.shape[2] < 2:
            raise ValueError(f"expected counts of shape (heads, 2, bins >= 2), found {counts.shape}")
        if not np.isfinite(counts).all():
            raise ValueError("expected finite counts, found NaN or infinity")
        object.__setattr__(self, "counts", counts)

    @property
    def num_heads(self) -> int:
        return int(self.counts.shape[0])

    @property
    def num_bins(self) -> int:
        return int(self.counts.shape[2])

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The array by name, as it is sent."""
        return {"histogram": self.counts}

    def __add__(self, other: Histogram) -> Histogram:
        """Merges two histograms of equal shape.

        Noise of independent sites adds in variance: the merged noise's standard deviation is
        ``math.hypot(first_std, second_std)``.
        """
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"expected counts of shape {self.counts.shape}, found {other.counts.shape}")
        return Histogram(counts=self.counts + other.counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Every case's score: exact, for privacy=none, public evaluation data and the simulation harness.

    Attributes:
        scores: float32, (cases, heads), in [0, 1].
        targets: int8, (cases, heads), 1 where the head's statement is true of the case.
        weights: float64, (cases,), not negative; the cases of one patient sum to 1.

    Raises:
        ValueError: wrong shape, or a value out of range.
    """

    scores: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int8]
    weights: Floats

    def __post_init__(self) -> None:
        for name, dtype in (("scores", np.float32), ("targets", np.int8), ("weights", np.float64)):
            object.__setattr__(self, name, _read_only(getattr(self, name), dtype))
        if self.scores.ndim != 2 or self.scores.shape[1] < 1 or self.targets.shape != self.scores.shape:
            raise ValueError(
                f"expected scores and targets of one shape (cases, heads >= 1), "
                f"found {self.scores.shape} and {self.targets.shape}"
            )
        if self.weights.shape != self.scores.shape[:1]:
            raise ValueError(f"expected weights of shape ({len(self.scores)},), found {self.weights.shape}")
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise ValueError("expected scores in [0, 1]")
        if not ((self.targets == 0) | (self.targets == 1)).all():
            raise ValueError("expected targets of 0 and 1")
        if not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise ValueError("expected finite weights >= 0")

    @property
    def num_heads(self) -> int:
        return int(self.scores.shape[1])

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The three arrays by name, as they are sent and stored."""
        return {"scores": self.scores, "targets": self.targets, "weights": self.weights}

    def __add__(self, other: Scores) -> Scores:
        """Concatenates the cases of two sites; a patient who is at both counts twice."""
        if self.num_heads != other.num_heads:
            raise ValueError(f"expected scores of {self.num_heads} heads, found {other.num_heads}")
        return Scores(
            scores=np.concatenate([self.scores, other.scores]),
            targets=np.concatenate([self.targets, other.targets]),
            weights=np.concatenate([self.weights, other.weights]),
        )

    def histogram(self, bins: int) -> Histogram:
        """Returns the exact histogram; noise is the releasing site's business."""
        index = bin_indices(self.scores, bins)
        counts = np.zeros((self.num_heads, 2, bins))
        for head in range(self.num_heads):
            np.add.at(counts[head], (self.targets[:, head], index[:, head]), self.weights)
        return Histogram(counts=counts)


Statistic = Histogram | Scores


def num_heads(num_outputs: int) -> int:
    """Returns the number of heads of a model with so many outputs (``Asked.num_outputs``).

    >>> num_heads(1), num_heads(9)
    (1, 10)
    """
    if num_outputs < 1:
        raise ValueError(f"expected at least 1 output, found {num_outputs}")
    return 1 if num_outputs == 1 else num_outputs + 1


def l2_sensitivity(num_outputs: int) -> float:
    """Bounds how far one patient can move a ``Histogram``'s counts, in Euclidean norm.

    **Guarantee.** Unit: the patient, added to or removed from the data; assumed: the weights of the
    patient's cases are not negative and sum to at most 1 (``patient_weights``). In each head these
    weights are spread over the cells, so a head moves by at most 1, and all of them by sqrt(heads).

    >>> l2_sensitivity(1)
    1.0
    """
    return math.sqrt(num_heads(num_outputs))


def patient_weights(patients: Sequence[npt.NDArray[np.int64]], *, num_cases: int) -> Floats:
    """Returns float64 (cases,): 1/n for each of a patient's n cases.

    >>> patient_weights([np.array([0, 2]), np.array([1])], num_cases=3).tolist()
    [0.5, 1.0, 0.5]
    """
    weights = np.zeros(num_cases)
    for cases in patients:
        weights[cases] = 1.0 / len(cases)
    return weights


def score_statistics(logits: npt.ArrayLike, *, targets: npt.ArrayLike, weights: npt.ArrayLike) -> Scores:
    """Turns a model's outputs into scores by head.

    A NaN logit scores as if the model knew nothing: an exception would itself be a release, and the
    metrics show such a model for what it is.

    Args:
        logits: (cases, 1) for two classes (sigmoid), (cases, num_classes) for more (softmax), or for several
            labels (sigmoid each).
        targets: (cases,) index into the plan's classes, or (cases, labels) of 0 and 1.
        weights: (cases,) see ``patient_weights``.

    Raises:
        ValueError: shapes that do not fit each other, or a target out of range.
    """
    outputs = np.nan_to_num(np.asarray(logits, dtype=np.float64), nan=0.0, posinf=1e6, neginf=-1e6)
    truth = np.asarray(targets, dtype=np.int64)
    if outputs.ndim != 2 or truth.shape not in ((len(outputs),), outputs.shape):
        raise ValueError(f"expected logits and targets that fit, found {outputs.shape}, {truth.shape}")
    limit = 2 if truth.ndim == 2 or outputs.shape[1] == 1 else outputs.shape[1]
    if truth.size and (truth.min() < 0 or truth.max() >= limit):
        raise ValueError(f"expected targets in [0, {limit}), found {truth.min()} to {truth.max()}")
    if truth.ndim == 2:
        scores, heads = _label_heads(outputs, truth)
    else:
        scores, heads = (_binary_heads if outputs.shape[1] == 1 else _class_heads)(outputs, truth)
    return Scores(
        scores=scores.astype(np.float32),
        targets=heads.astype(np.int8),
        weights=np.asarray(weights, dtype=float),
    )


def merge(statistics: Iterable[Statistic]) -> Statistic:
    """Merges the statistics of several sites into one.

    Exact scores beside histograms are binned first, so that everything is counted at one resolution.

    Raises:
        ValueError: nothing to merge, or statistics of different tasks.
    """
    found = list(statistics)
    if not found:
        raise ValueError("expected at least one statistic, found none")
    bins = next((item.num_bins for item in found if isinstance(item, Histogram)), None)
    if bins is None:
        return functools.reduce(operator.add, found)
    binned = [item.histogram(bins) if isinstance(item, Scores) else item for item in found]
    return functools.reduce(operator.add, binned)


def levels(statistic: Statistic, head: int) -> Floats:
    """Returns (2, levels): weight of negatives and positives at each distinct score, ascending."""
    if isinstance(statistic, Histogram):
        counts: Floats = statistic.counts[head]
        return counts
    values, index = np.unique(statistic.scores[:, head], return_inverse=True)
    weights = np.zeros((2, values.size))
    np.add.at(weights, (statistic.targets[:, head], index), statistic.weights)
    return weights


def _binary_heads(logits: Floats, truth: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[Any]]:
    # tanh, since exp overflows for the large logits of a model that has diverged
    return 0.5 * (1 + np.tanh(logits / 2)), truth[:, None]


def _label_heads(logits: Floats, truth: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[Any]]:
    probs = 0.5 * (1 + np.tanh(logits / 2))
    confidence = np.maximum(probs, 1 - probs).prod(axis=1, keepdims=True)
    correct = ((probs >= 0.5) == truth).all(axis=1, keepdims=True)
    return np.concatenate([probs, confidence], axis=1), np.concatenate([truth, correct], axis=1)


def _class_heads(logits: Floats, truth: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[Any]]:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = exponentials / exponentials.sum(axis=1, keepdims=True)
    scores = np.concatenate([probs, probs.max(axis=1, keepdims=True)], axis=1)
    one_hot = truth[:, None] == np.arange(logits.shape[1])
    correct = (probs.argmax(axis=1) == truth)[:, None]
    return np.minimum(scores, 1.0), np.concatenate([one_hot, correct], axis=1)


def _read_only(array: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    copy = np.array(array, dtype=dtype)
    copy.flags.writeable = False
    return copy
