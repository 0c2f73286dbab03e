"""How good a model is, whatever a case is labelled with: what sites release of it, and its headline number.

Classes and labels are measured by scores (``common/scores.py``), masks by Dice (``common/dice.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy.typing as npt

from common import dice, intervals, ranking, scores
from common.asked import Asked
from common.dice import DiceScores, DiceStatistic, DiceSums
from common.scores import Histogram, Scores

Exact = Scores | DiceScores
Noised = Histogram | DiceSums
Statistic = Exact | Noised
Arrays = Mapping[str, npt.NDArray[Any]]

ANY = -1
"""A length that a site chooses: the number of its cases or patients; one number for all arrays."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one number of a report: the report's key for it, its name, and what guessing would give."""

    key: str
    name: str
    guessing: float | None


AUROC = Headline(key="auroc", name="AUROC", guessing=0.5)
DICE = Headline(key="dice", name="Dice", guessing=None)


@dataclass(frozen=True, kw_only=True)
class ArrayKind:
    """What an array that a site sends must be; ``ANY`` for a length of the site's own."""

    shape: tuple[int, ...]
    dtype: str


def headline(target: str) -> Headline:
    """Returns the headline of a plan by its ``target``."""
    return DICE if target == "mask" else AUROC


def arrays_of(asked: Asked, *, bins: int, exact: bool) -> dict[str, ArrayKind]:
    """Returns the arrays of a site's evaluation by name.

    Args:
        bins: of the released histograms.
        exact: without privacy, or of public data.
    """
    if asked.target == "mask":
        foreground = len(asked.classes) - 1
        if exact:
            return {"dice": ArrayKind(shape=(ANY, foreground), dtype="float64")}
        return {"sums": ArrayKind(shape=(foreground + 1,), dtype="float64")}
    heads = scores.num_heads(asked.num_outputs)
    if not exact:
        return {"histogram": ArrayKind(shape=(heads, 2, bins), dtype="float64")}
    return {
        "scores": ArrayKind(shape=(ANY, heads), dtype="float32"),
        "targets": ArrayKind(shape=(ANY, heads), dtype="int8"),
        "weights": ArrayKind(shape=(ANY,), dtype="float64"),
    }


def statistic(arrays: Arrays) -> Statistic:
    """Returns the statistic that a site sent.

    Raises:
        ValueError: values out of range.
    """
    if "histogram" in arrays:
        return Histogram(counts=arrays["histogram"])
    if "sums" in arrays:
        return DiceSums(sums=arrays["sums"])
    if "dice" in arrays:
        return DiceScores(dice=arrays["dice"])
    return Scores(**arrays)


def noised(exact: Exact, *, bins: int) -> Noised:
    """Returns what a site releases instead of exact scores, still without noise."""
    return exact.sums() if isinstance(exact, DiceScores) else exact.histogram(bins)


def l2_sensitivity(asked: Asked) -> float:
    """Bounds how far one patient moves the arrays that a site releases, in Euclidean norm; see
    ``scores.l2_sensitivity`` and ``dice.l2_sensitivity``."""
    if asked.target == "mask":
        return dice.l2_sensitivity(len(asked.classes) - 1)
    return scores.l2_sensitivity(asked.num_outputs)


def merge(statistics: Mapping[str, Statistic]) -> Statistic:
    """Merges the statistics of several sites into one, in the order of their names.

    **Guarantee.** The bits do not depend on which site answered first.

    Args:
        statistics: by site.

    Raises:
        ValueError: nothing to merge, or statistics of different plans.
    """
    found = [statistics[site] for site in sorted(statistics)]
    if found and all(isinstance(item, DiceSums | DiceScores) for item in found):
        return dice.merge(cast(list[DiceStatistic], found))
    return scores.merge(cast(list[scores.Statistic], found))


def value(statistic: Statistic) -> float | None:
    """Returns the headline number; ``None`` where it is undefined."""
    if isinstance(statistic, DiceSums | DiceScores):
        return dice.mean(statistic)
    return ranking.auroc(statistic)


def interval(statistic: Statistic, *, noise_std: float) -> tuple[float, float] | None:
    """Returns the 95 % interval of the headline number, of the choice of patients and the noise.

    Args:
        noise_std: standard deviation of the noise in every number of the statistic; 0 for exact scores.
    """
    if isinstance(statistic, DiceSums | DiceScores):
        return dice.interval(statistic, noise_std=noise_std)
    return intervals.interval(statistic, noise_std=noise_std)
