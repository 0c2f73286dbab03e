"""Values out of messages that came from elsewhere: checked before anything is made of them."""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import InvalidReply

FloatArray = np.ndarray[Any, np.dtype[Any]]
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
        values = content(array)
    except ValueError:
        raise InvalidReply("shape") from None
    if not np.isfinite(values).all():
        raise InvalidReply("non_finite")
    return values


def content(array: Array) -> FloatArray:
    """Returns the values of an array that came from elsewhere; read-only, in the memory that they came in.

    Not by numpy's reader, which allocates whatever a header claims, opens archives, and raises errors of
    half a dozen kinds.

    Raises:
        ValueError: the bytes are not an npy file of exactly the declared shape and dtype.
    """
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        raise ValueError("expected the name of a dtype") from None
    shape = tuple(array.shape)
    start = 10 + int.from_bytes(array.data[8:10], "little")
    header = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    if array.stype != "numpy.ndarray" or array.data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("expected an npy file")
    if array.data[10:start].decode("latin1").rstrip() != header:
        raise ValueError(f"expected an npy file with the header {header}")
    return np.frombuffer(array.data, dtype, offset=start).reshape(shape)


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
