"""Values out of messages that came from elsewhere: checked before anything is made of them."""

from __future__ import annotations

import math
import re
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.arrays import unpacked
from common.errors import InvalidReply
from common.quantisation import FloatArray

Part = TypeVar("Part", ArrayRecord, ConfigRecord, MetricRecord)


def decoded(array: Array, *, shape: tuple[int, ...], dtype: str) -> FloatArray:
    """Decodes an array of this shape and dtype; what it declares may lie, so its bytes are checked too.

    Raises:
        InvalidReply: ``shape``, ``dtype`` or ``non_finite``.
    """
    if tuple(array.shape) != shape:
        raise InvalidReply("shape")
    if array.dtype != dtype:
        raise InvalidReply("dtype")
    try:
        values = unpacked(array)
    except ValueError:
        raise InvalidReply("shape") from None
    if not np.isfinite(values).all():
        raise InvalidReply("non_finite")
    return values


def part(record: RecordDict, name: str, kind: type[Part]) -> Part:
    """Returns the part of a message's content that has this name and kind.

    Not by Flower's views (``record.array_records``): such a view knows the record, and the record the view,
    a ring that keeps 100 MB of a model in memory until the collector comes by.

    Raises:
        KeyError: there is none, or it is of another kind.
    """
    found = record[name]
    if not isinstance(found, kind):
        raise KeyError(name)
    return found


def run_id(value: object) -> str:
    """Returns a run's id, which names folders at the site, so it must not lead anywhere else.

    Raises:
        ValueError: it might.
    """
    run = text(value)
    if not re.fullmatch(r"[\w-][\w.-]*", run):
        raise ValueError("expected a run id of letters, digits, '-', '_' and '.'")
    return run


def text(value: object) -> str:
    """Returns a short text. Raises ValueError for anything else."""
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError("expected a short text")
    return value


def count(value: object) -> int:
    """Returns a whole number that is exact as a float, too. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError("expected a count")
    return value


def _finite(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def metric(value: object) -> float:
    """Returns a finite number. Raises InvalidReply (``non_finite``) for anything else."""
    try:
        return _finite(value)
    except ValueError:
        raise InvalidReply("non_finite") from None


def weight(value: object) -> float:
    """Returns the weight of a site. Raises InvalidReply for what cannot be one."""
    claimed = metric(value)
    if not 0 < claimed <= 1e7:
        raise InvalidReply("weight")
    return claimed
