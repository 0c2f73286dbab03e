"""Arrays of numbers in messages: their bytes and nothing else.

Type and shape are fields of the message beside them. A file in numpy's format, as Flower would send, repeats
both in a header of 128 bytes for each array, which its reader believes.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from flwr.app import Array

FloatArray = np.ndarray[Any, np.dtype[Any]]
STYPE: Final = "little-endian"
"""Says how the bytes are to be read, where Flower says "numpy.ndarray"."""
_KINDS = "iuf"


def packed(values: FloatArray) -> Array:
    """Returns an array as it travels: little-endian, the last axis fastest."""
    stored = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return Array(dtype=values.dtype.name, shape=values.shape, stype=STYPE, data=stored.tobytes())


def unpacked(array: Array) -> FloatArray:
    """Returns the values of an array that came from elsewhere; read-only, in the memory that they came in.

    Raises:
        ValueError: the bytes are not numbers of exactly the declared type and shape.
    """
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        raise ValueError("expected the name of a dtype") from None
    shape = tuple(array.shape)
    if array.stype != STYPE or dtype.kind not in _KINDS or dtype.name != array.dtype:
        raise ValueError(f"expected {STYPE} numbers")
    if min(shape, default=0) < 0 or len(array.data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"expected the bytes of an array of shape {shape}")
    return np.frombuffer(array.data, dtype.newbyteorder("<")).reshape(shape)
