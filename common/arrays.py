"""Arrays of numbers in messages: their bytes and nothing else.

Type and shape are fields of the message beside them. A file in numpy's format, as Flower would send, repeats
both in a header of 128 bytes for each array, which its reader believes.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from flwr.app import Array

from common.quantisation import FloatArray

STYPE: Final = "little-endian"
"""Says how the bytes are to be read, where Flower says "numpy.ndarray"."""
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NAMES = (*_INTEGERS, "float16", "float32", "float64")
_DTYPES: Final = {name: np.dtype(name).newbyteorder("<") for name in _NAMES}
"""Looked up and not parsed: numpy evaluates parts of a dtype's name."""


def packed(values: FloatArray) -> Array:
    """Returns an array as it travels: little-endian, the last axis fastest.

    Args:
        values: integers or floats, no longer than 64 bits.
    """
    stored = values.astype(_DTYPES[values.dtype.name], copy=False)
    return Array(dtype=values.dtype.name, shape=values.shape, stype=STYPE, data=stored.tobytes())


def unpacked(array: Array) -> FloatArray:
    """Returns the values of an array that came from elsewhere; read-only, in the memory that they came in.

    Raises:
        ValueError: the bytes are not numbers of exactly the declared type and shape.
    """
    dtype, shape = _DTYPES.get(array.dtype), tuple(array.shape)
    if array.stype != STYPE or dtype is None:
        raise ValueError(f"expected {STYPE} numbers")
    if min(shape, default=0) < 0 or len(array.data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"expected the bytes of an array of shape {shape}")
    return np.frombuffer(array.data, dtype).reshape(shape)
