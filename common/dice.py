"""Mergeable statistics of segmentation: what a site releases of how well masks are drawn.

A patient's Dice of a class is the mean over the patient's cases, in [0, 1]; a class that is neither in a
case's mask nor in the model's answer has a Dice of 1 there. The background has none.

A site releases ``DiceSums``, to which it has added noise, or, where nothing needs protection, the exact
``DiceScores`` of every patient. A metric that is undefined is ``None``, never NaN.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CENTRE = 0.5
"""Half of the range of a Dice: what is summed is the distance from it, which is at most a half."""

_FEWEST_FOR_STUDENT = 3
"""Of fewer patients the variance is hardly known, and the cautious one is taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DiceSums:
    """Sums over patients; exact, or with noise added to every number.

    Attributes:
        sums: float64, (foreground classes + 1,): for each class the sum over patients of (Dice - 1/2), then
            the number of patients. Centred at 1/2, one patient moves a sum by at most 1/2 instead of 1, so
            that less noise hides it, and the mean, 1/2 + sum / number, is the same.

    Raises:
        ValueError: wrong shape or a number that is not finite.
    """

    sums: Floats

    def __post_init__(self) -> None:
        sums = _read_only(self.sums)
        if sums.ndim != 1 or sums.size < 2:
            raise ValueError(f"expected sums of shape (classes + 1,), found {sums.shape}")
        if not np.isfinite(sums).all():
            raise ValueError("expected finite sums, found NaN or infinity")
        object.__setattr__(self, "sums", sums)

    @property
    def num_classes(self) -> int:
        """Classes without the background."""
        return int(self.sums.size) - 1

    @property
    def arrays(self) -> dict[str, Floats]:
        """The array by name, as it is sent."""
        return {"sums": self.sums}

    @property
    def num_patients(self) -> float:
        """Number of patients; noise may make it fractional and negative."""
        return float(self.sums[-1])

    def __add__(self, other: DiceSums) -> DiceSums:
        """Merges two sites; independent noise adds in variance."""
        if self.num_classes != other.num_classes:
            raise ValueError(f"expected sums of {self.num_classes} classes, found {other.num_classes}")
        return DiceSums(sums=self.sums + other.sums)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiceScores:
    """Every patient's Dice: exact, for privacy=none, public evaluation data and the simulation harness.

    Attributes:
        dice: float64, (patients, foreground classes), in [0, 1].

    Raises:
        ValueError: wrong shape, or a value out of range.
    """

    dice: Floats

    def __post_init__(self) -> None:
        dice = _read_only(self.dice)
        if dice.ndim != 2 or dice.shape[1] < 1:
            raise ValueError(f"expected dice of shape (patients, classes >= 1), found {dice.shape}")
        if not ((dice >= 0) & (dice <= 1)).all():
            raise ValueError("expected dice in [0, 1]")
        object.__setattr__(self, "dice", dice)

    @property
    def num_classes(self) -> int:
        """Classes without the background."""
        return int(self.dice.shape[1])

    @property
    def arrays(self) -> dict[str, Floats]:
        """The array by name, as it is sent and stored."""
        return {"dice": self.dice}

    def __add__(self, other: DiceScores) -> DiceScores:
        """Concatenates the patients of two sites; a patient who is at both counts twice."""
        if self.num_classes != other.num_classes:
            raise ValueError(f"expected dice of {self.num_classes} classes, found {other.num_classes}")
        return DiceScores(dice=np.concatenate([self.dice, other.dice]))

    def sums(self) -> DiceSums:
        """Returns the exact sums; noise is the releasing site's business."""
        return DiceSums(sums=np.append((self.dice - _CENTRE).sum(axis=0), len(self.dice)))


DiceStatistic = DiceSums | DiceScores


def l2_sensitivity(num_classes: int) -> float:
    """Bounds how far one patient can move ``DiceSums``, in Euclidean norm.

    **Guarantee.** Unit: the patient, added to or removed from the data. A patient's Dice lies in [0, 1],
    however many cases it is the mean of, so each of the sums moves by at most 1/2, and the number of
    patients by 1.

    Args:
        num_classes: without the background.

    >>> l2_sensitivity(4)
    1.4142135623730951
    """
    if num_classes < 1:
        raise ValueError(f"expected at least 1 class beside the background, found {num_classes}")
    return math.sqrt(num_classes * _CENTRE**2 + 1)


def merge(statistics: Iterable[DiceStatistic]) -> DiceStatistic:
    """Merges the statistics of several sites into one; exact scores beside sums are summed first.

    Raises:
        ValueError: nothing to merge, or statistics of different tasks.
    """
    found = list(statistics)
    if not found:
        raise ValueError("expected at least one statistic, found none")
    if all(isinstance(item, DiceScores) for item in found):
        return functools.reduce(operator.add, found)
    return functools.reduce(operator.add, [_summed(item) for item in found])


def by_class(statistic: DiceStatistic) -> tuple[float, ...] | None:
    """Returns the mean Dice over patients of each class but the background; ``None`` where nobody is left."""
    sums = _summed(statistic)
    if sums.num_patients <= 0:
        return None
    means = np.clip(_CENTRE + sums.sums[:-1] / sums.num_patients, 0.0, 1.0)
    return tuple(float(mean) for mean in means)


def mean(statistic: DiceStatistic) -> float | None:
    """Returns the mean Dice over patients and all classes but the background; ``None`` of nobody."""
    sums = _summed(statistic)
    if sums.num_patients <= 0:
        return None
    centred = float(sums.sums[:-1].mean()) / sums.num_patients
    return min(1.0, max(0.0, _CENTRE + centred))


def interval(
    statistic: DiceStatistic, *, noise_std: float = 0.0, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Returns a confidence interval of the mean Dice: the choice of patients and the noise are both in it.

    Of sums, all values t are kept for which the sum over patients of (Dice - t), whose mean is zero at the
    true mean, lies within the normal quantile of its own standard deviation at t. Nothing is divided by a
    noisy number, so where noise drowns the patients the interval becomes (0, 1). How patients differ is not
    released: their variance is taken as t (1 - t), the most that values in [0, 1] with mean t can have, so
    these intervals are cautious. Of exact scores it is Student's interval of the patients' own means.

    Args:
        noise_std: standard deviation of the noise in every number of this (merged) statistic; 0 for exact
            scores.
        confidence: two-sided, in (0, 1).

    Returns:
        Lower and upper limit, in [0, 1], or ``None`` where the mean is undefined.

    Raises:
        ValueError: an impossible noise or confidence.

    **Source:** Fieller 1954, Some problems in interval estimation (the inversion); Bhatia, Davis 2000, A
    better bound on the variance; Student 1908, The probable error of a mean.
    """
    _check(statistic, noise_std=noise_std, confidence=confidence)
    point = mean(statistic)
    if point is None:
        return None
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    if isinstance(statistic, DiceScores) and len(statistic.dice) >= _FEWEST_FOR_STUDENT:
        return _students(statistic.dice.mean(axis=1), quantile=quantile)
    low, high = _kept(_summed(statistic), noise_std=noise_std, quantile=quantile)
    return min(low, point), max(high, point)


def _check(statistic: DiceStatistic, *, noise_std: float, confidence: float) -> None:
    if noise_std < 0 or not math.isfinite(noise_std):
        raise ValueError(f"expected a finite noise_std >= 0, found {noise_std}")
    if noise_std and isinstance(statistic, DiceScores):
        raise ValueError(f"expected noise_std=0 for exact scores, found {noise_std}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), found {confidence}")


def _kept(sums: DiceSums, *, noise_std: float, quantile: float) -> tuple[float, float]:
    """Solves (S - u n)^2 <= z^2 (n (1/4 - u^2) + v/F + u^2 v) for u = t - 1/2 in [-1/2, 1/2].

    S is the mean over the F classes of the sums, v the variance of the noise in each. The parabola
    (n^2 + z^2 (n - v)) u^2 - 2 S n u + S^2 - z^2 (n/4 + v/F) is not positive between its roots where it
    opens upwards. Where it does not, noise drowns the patients, and the whole range is kept.
    """
    number, centred = sums.num_patients, float(sums.sums[:-1].mean())
    variance, squared = noise_std**2, quantile**2
    leading = number**2 + squared * (number - variance)
    constant = centred**2 - squared * (number / 4 + variance / sums.num_classes)
    discriminant = (centred * number) ** 2 - leading * constant
    if leading <= 0:
        return 0.0, 1.0
    reach = math.sqrt(max(discriminant, 0.0))
    low, high = (centred * number - reach) / leading, (centred * number + reach) / leading
    return _within(_CENTRE + low), _within(_CENTRE + high)


def _students(means: Floats, *, quantile: float) -> tuple[float, float]:
    reach = student_quantile(quantile, degrees=len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return _within(float(means.mean() - reach)), _within(float(means.mean() + reach))


def student_quantile(normal: float, *, degrees: int) -> float:
    """Returns the quantile of Student's distribution where the normal one has ``normal``.

    Too small by 0.1 % at 3 degrees of freedom and the 97.5 % quantile, by 1 % at 2, and less above.

    **Source:** Abramowitz, Stegun 1972, Handbook of Mathematical Functions, 26.7.5.
    """
    z, square = normal, normal**2
    terms = (
        z,
        z * (square + 1) / 4,
        z * (5 * square**2 + 16 * square + 3) / 96,
        z * (3 * square**3 + 19 * square**2 + 17 * square - 15) / 384,
        z * (79 * square**4 + 776 * square**3 + 1482 * square**2 - 1920 * square - 945) / 92160,
    )
    return sum(term / float(degrees) ** power for power, term in enumerate(terms))


def _within(value: float) -> float:
    return min(1.0, max(0.0, value))


def _summed(statistic: DiceStatistic) -> DiceSums:
    return statistic.sums() if isinstance(statistic, DiceScores) else statistic


def _read_only(array: npt.ArrayLike) -> Floats:
    copy = np.array(array, dtype=np.float64)
    copy.flags.writeable = False
    return copy
