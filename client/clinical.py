"""Clinical values of a case as the row of numbers that a plan wants; what is missing is told as missing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from common.asked import Category, ClinicalValue, Number
from common.errors import UnusableCase

LIMIT = 10.0  # standard deviations; a wrong unit must not drown the image


def features(texts: Mapping[str, str], asked: tuple[ClinicalValue, ...]) -> list[float]:
    """Returns the row of numbers: for each value its features, and 1.0 where it is missing, else 0.0.

    Args:
        texts: what the table says by the value's name; "" is missing.

    Raises:
        UnusableCase: ``bad_value`` for a text that is no number, or none of the words.
    """
    return [number for value in asked for number in _features(texts[value.name], value)]


def array(rows: list[list[float]], *, num_features: int) -> np.ndarray:
    """Returns the rows of all cases: float32, (cases, features), read only."""
    made = np.array(rows, dtype=np.float32).reshape(len(rows), num_features)
    made.flags.writeable = False
    return made


def none(num_cases: int) -> np.ndarray:
    """Returns the rows of so many cases where a plan asks for no clinical value: (cases, 0)."""
    return array([[]] * num_cases, num_features=0)


def _features(text: str, value: ClinicalValue) -> list[float]:
    match value:
        case Number():
            return [0.0, 1.0] if not text else [_scaled(text, value), 0.0]
        case Category():
            if text and text not in value.values:
                raise UnusableCase("bad_value", f"Expected a {value.name} that the plan names.")
            return [*(float(text == word) for word in value.values), float(not text)]


def _scaled(text: str, value: Number) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UnusableCase("bad_value", f"Expected a number as {value.name}, found another text.")
    return max(-LIMIT, min(LIMIT, (number - value.mean) / value.std))
