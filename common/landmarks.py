"""Landmarks of intensity: what a plan asks of them, what sites release, and what is made of it.

A landmark is a percentile of a case's intensities, after the lowest and the highest landmark were brought to
0 and 1. A site releases, for each landmark, a histogram of it over the patients of its training part. The
medians over all sites are the values of the step ``landmarks`` of a later plan.

Source: Nyul, Udupa and Zhang (2000), New Variants of a Method of MRI Scale Standardization. They take the
mean over images; here it is the median, which noise in bins far away moves least.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from common.asked import Asked, Preprocessing
from common.steps import Landmarks, Percent, Percentile, Resize, Scaling, Sizing, Step
from common.value import Value

Floats = npt.NDArray[np.float64]

DECIMALS = 3
"""Of a landmark's value: finer than any histogram; two landmarks differ in the last of them at least."""
MOST_UNCERTAIN = 0.15
"""Standard deviation, in fractions of the patients, of the place at which a median is read. Beyond, the
landmarks would be those of the noise."""


class LandmarkHistograms(Value):
    """Asks for histograms of landmarks, in ``bins`` equally wide bins from 0 to 1, instead of training.

    The lowest and the highest landmark are those of the step ``percentile``, whose place ``landmarks`` takes
    in the later plan; ``percentiles`` are those between them.
    """

    percentiles: Annotated[tuple[Percent, ...], Field(min_length=1, max_length=99)]
    bins: Annotated[int, Field(ge=4, le=1000)]

    @model_validator(mode="after")
    def _percentiles_increase(self) -> Self:
        if list(self.percentiles) != sorted(set(self.percentiles)):
            raise ValueError(f"expected percentiles that increase, found {list(self.percentiles)}")
        return self


def check_place(asked: LandmarkHistograms, preprocessing: Preprocessing) -> None:
    """Checks that the landmarks lie between those of a step ``percentile``.

    Raises:
        ValueError: there is no such step, or they do not.
    """
    scaling = next(step for step in preprocessing.steps if isinstance(step, Scaling))
    if not isinstance(scaling, Percentile):
        raise ValueError(
            "plan.landmarks needs the step percentile, whose place landmarks takes later, found "
            f"{scaling.name}"
        )
    if not scaling.lower < asked.percentiles[0] or not asked.percentiles[-1] < scaling.upper:
        raise ValueError(
            f"expected landmarks.percentiles between those of the step percentile, {scaling.lower:g} and "
            f"{scaling.upper:g}, found {list(asked.percentiles)}"
        )


def measured(asked: Asked) -> Asked:
    """Returns what is asked of a case for its landmarks: the steps up to the scaling, and ``resize``."""
    steps = asked.preprocessing.steps
    end = 1 + next(place for place, step in enumerate(steps) if isinstance(step, Scaling))
    kept = steps[:end] if any(isinstance(step, Sizing) for step in steps[:end]) else (*steps[:end], _RESIZE)
    # not validated anew: a plan may not resample and then resize, since one of the two is then for nothing
    preprocessing = asked.preprocessing.model_copy(update={"steps": kept})
    return asked.model_copy(update={"preprocessing": preprocessing})


_RESIZE = Resize(name="resize")


def harmonised(
    preprocessing: Preprocessing, *, asked: LandmarkHistograms, values: tuple[float, ...]
) -> tuple[Step, ...]:
    """Returns the steps of the later plan: the same, with ``landmarks`` in place of ``percentile``."""

    def in_its_place(step: Step) -> Step:
        if not isinstance(step, Percentile):
            return step
        percentiles = (step.lower, *asked.percentiles, step.upper)
        return Landmarks(name="landmarks", percentiles=percentiles, values=(0.0, *values, 1.0))

    return tuple(in_its_place(step) for step in preprocessing.steps)


def histograms(patients: npt.NDArray[Any], *, bins: int) -> Floats:
    """Returns float64 (landmarks, bins): how many patients have each landmark in each bin.

    Args:
        patients: (patients, landmarks); what is outside of [0, 1] counts in the outermost bins, and what is
            no number in the lowest, so that every patient counts once in each histogram.

    >>> histograms(np.array([[0.1, 0.9], [0.3, 1.0]]), bins=4).tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    """
    number = patients.shape[1]
    places = np.clip(np.nan_to_num(patients, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    indices = np.minimum((places * bins).astype(np.int64), bins - 1)
    counts = np.zeros((number, bins))
    np.add.at(counts, (np.broadcast_to(np.arange(number), indices.shape), indices), 1.0)
    return counts


def l2_sensitivity(num_landmarks: int) -> float:
    """Bounds how far one patient moves all histograms together, in Euclidean norm.

    **Guarantee.** Unit: the patient, added to or removed from the data. A patient counts once in each
    histogram, whatever the number of their cases, so each moves by 1 and all of them by sqrt(landmarks).

    >>> l2_sensitivity(4)
    2.0
    """
    return math.sqrt(num_landmarks)


def uncertainty(counts: Floats, *, noise_std: float) -> float:
    """Returns the standard deviation, due to noise, of the place of a median in fractions of the patients.

    At a median the patients below and above are as many; noise of every bin is in their difference.

    Args:
        noise_std: standard deviation of the noise in every count.
    """
    patients = float(counts.sum()) / len(counts)
    return noise_std * math.sqrt(counts.shape[1]) / 2 / patients if patients > 0 else math.inf


def values(counts: Floats) -> tuple[float, ...]:
    """Returns the median of every landmark, strictly between 0 and 1 and strictly increasing.

    Args:
        counts: (landmarks, bins), exact or noised; noise may have made some of them negative.

    >>> values(np.array([[0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]))
    (0.375, 0.75)
    """
    least = 10.0**-DECIMALS
    apart = least * np.arange(1, len(counts) + 1)
    medians = np.array([_median(row) for row in counts])
    # rounded before they are set apart: of two halves, such as 0.9755 and 0.9765, both may go to the even one
    rest = np.round(np.clip(medians - apart, 0, 1 - least * (len(counts) + 1)), DECIMALS)
    return tuple(float(value) for value in np.round(np.maximum.accumulate(rest) + apart, DECIMALS))


def _median(counts: Floats) -> float:
    """Reads the place where as many are below as above, linearly within its bin."""
    below = np.concatenate([[0.0], np.cumsum(counts)])
    # what falls because of noise is made level, halfway between the two ways of doing it
    rising = np.maximum.accumulate(below) + np.minimum.accumulate(below[::-1])[::-1]
    edges = np.linspace(0, 1, len(below))
    half = below[-1]  # of both ways together
    first, last = np.interp(half, rising, edges), 1 - np.interp(-half, -rising[::-1], edges)
    return float(first + last) / 2
