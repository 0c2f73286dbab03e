"""YAML that people write: plain values, and one kind of error."""

from __future__ import annotations

from typing import Any

import yaml

from common.errors import ConfigError

UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What the parser raises: its own errors, and those of numbers, dates and nesting it does not foresee."""


def tree_of(text: str | bytes) -> Any:
    """Returns what a YAML text says, as dictionaries, lists and scalars; nothing in it is executed.

    By libyaml, since the parser in Python takes minutes over some hundred kilobytes of brackets.

    Raises:
        ConfigError: it is no YAML; the first line of the reason.
    """
    try:
        return yaml.CSafeLoader(text).get_single_data()
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"Expected YAML, found: {reason}.") from None
