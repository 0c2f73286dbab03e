"""YAML that people write: plain values, one kind of error, and what to change in a file of an older version.

Settings are a person's decisions, so that no update changes them: it says line by line what to write, and
every value that it proposes is that of a new directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final

import yaml

from common import schema
from common.errors import ConfigError, SchemaError

SCHEMA: Final = 2
"""Of ``site.yaml`` and ``coordinator.yaml``, the key ``schema``; the first had no mark."""
REPLACED: Final = {
    "approve": "the rules of policies decide now; docs/approval.md",
}
"""Keys that went, and what came in their place."""

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


def current(tree: Any, *, template: str, **given: object) -> Any:
    """Returns settings without their key ``schema``, if they are of this version.

    Args:
        template: the file in ``conf/`` from which new settings are written.
        given: what stands in its places.

    Raises:
        SchemaError: older or newer settings; of older ones, every line that is to be changed.
    """
    if not isinstance(tree, dict):
        return tree
    found = schema.require(tree.get("schema", 1), newest=SCHEMA, what="settings")
    if found == SCHEMA:
        return {key: value for key, value in tree.items() if key != "schema"}
    text = resources.files("conf").joinpath(template).read_text(encoding="utf-8")
    lines = "".join(f"\n  {line}" for line in changes(tree, tree_of(text.format(**given))))
    raise SchemaError(
        f"Expected settings of schema {SCHEMA}, found those of an older Feverfew; docs/operation.md explains "
        f"updates. Change these lines:{lines}"
    )


def changes(tree: Mapping[str, Any], wanted: Mapping[str, Any], *, place: str = "") -> Iterator[str]:
    """Yields a line for each key that settings lack, with the value of new settings, and each that went.

    >>> list(changes({"a": 1, "b": {}}, {"b": {"c": None}, "schema": 2}))
    ['remove  a', 'add     b.c: null', 'add     schema: 2']
    """
    for key in tree:
        if key not in wanted:
            why = REPLACED.get(f"{place}{key}", "")
            yield f"remove  {place}{key}" + (f"  ({why})" if why else "")
    for key, value in wanted.items():
        known = tree.get(key)
        if key not in tree or (key == "schema" and known != value):
            shown = yaml.safe_dump(
                {f"{place}{key}": value}, default_flow_style=True, width=10_000, sort_keys=False
            )
            yield f"add     {shown.strip()[1:-1]}"
        elif isinstance(known, dict) and isinstance(value, dict) and value and _is_section(known, value):
            yield from changes(known, value, place=f"{place}{key}.")


def _is_section(known: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Says whether two mappings have keys that are ours: not those of another kind, nor a person's own."""
    return known.get("kind") == value.get("kind") and not (set(known) - set(value))
