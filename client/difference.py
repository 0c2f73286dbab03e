"""What two plans have in common, key by key, and what not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from common.plan import Plan

ABSENT: Final = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key of a plan with its old and its new value."""

    key: str
    old: Any
    new: Any


def changes(old: Plan, new: Plan) -> list[Change]:
    """Returns the keys that differ, in the order of the new plan; ``ABSENT`` where a plan has no such key."""
    before, after = leaves(old), leaves(new)
    return [
        Change(key=key, old=before.get(key, ABSENT), new=after.get(key, ABSENT))
        for key in dict.fromkeys([*after, *before])
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


def leaves(plan: Plan) -> dict[str, Any]:
    """Returns every value of a plan by its key, such as ``model.channels`` or ``preprocessing.steps.0.name``.

    A list of plain values is one value.
    """
    return dict(_leaves("", plan.model_dump(mode="json")))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        inner = list(enumerate(value))
    if not inner:
        yield key, value
    for name, one in inner:
        yield from _leaves(f"{key}.{name}" if key else str(name), one)
