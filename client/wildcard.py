"""Patterns of descriptions, as hospitals know them from their PACS: ``*`` any text, ``?`` any letter."""

from __future__ import annotations

import re


def matches(pattern: str, text: str) -> bool:
    """Returns whether a pattern fits a whole text, without regard to case.

    >>> matches("*chest*", "CT Chest low dose"), matches("chest", "CT Chest"), matches("T1 [?]", "t1 [a]")
    (True, False, True)
    """
    wild = {"*": ".*", "?": "."}
    expression = "".join(wild.get(letter) or re.escape(letter) for letter in pattern)
    return re.fullmatch(expression, text, re.IGNORECASE | re.DOTALL) is not None
