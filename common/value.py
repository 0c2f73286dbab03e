"""Frozen values of settings and plans, the numbers that they hold, and their one JSON text."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)]


class Value(BaseModel):
    """A frozen value that refuses unknown keys, wrong types and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # fields may be mappings, which have no hash of their own


def canonical_json(tree: Any) -> str:
    """Returns the one JSON text of a tree: sorted keys, no spaces, ASCII, no NaN.

    >>> canonical_json({"b": 1.0, "a": [True, None]})
    '{"a":[true,null],"b":1.0}'
    """
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def first_problem(error: ValidationError) -> str:
    """Returns one line about the first thing that is wrong, with the key that is to blame."""
    found = error.errors(include_url=False)
    first = found[0]
    where = ".".join(str(part) for part in first["loc"]) or "plan"
    value = first.get("input")
    is_huge = isinstance(value, int) and value.bit_length() > 1024  # Python writes no number of any length
    is_plain = isinstance(value, (str, int, float, bool, type(None))) and not is_huge
    shown = f", found {value!r}" if is_plain else ""
    if first["type"] == "extra_forbidden":
        return f"Unknown key '{where}'; see conf/ for the keys that exist."
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}{more}."
