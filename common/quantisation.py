"""Parameters and updates as they travel: float32, float16, or int8 with a scale for each block of values.

Sites quantise after the noise, so that the privacy guarantee holds by post-processing (Dwork and Roth 2014,
The Algorithmic Foundations of Differential Privacy, proposition 2.1). Scales have few digits, so that
what was quantised once comes out of a second time unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np

from common.value import Value

FloatArray = np.ndarray[Any, np.dtype[Any]]
Form = Literal["fp32", "fp16", "int8"]
DTYPES: Final[dict[Form, str]] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""Of the values that are sent."""
BLOCK: Final[dict[Form, int]] = {"fp16": 4096, "int8": 256}
"""How many values share a scale."""
_LEVELS = 127
_LEAST = 2.0**-100
"""A block without a larger value is sent as zeros: its scale would leave the range of float32."""


class Exchange(Value):
    """What crosses the network, and how."""

    update: Form


def quantised(values: FloatArray, *, form: Form) -> dict[str, FloatArray]:
    """Returns what is sent for some values: "values", and but for fp32 "scales".

    Args:
        values: float32, (size,), finite.

    Returns:
        values: float32, float16 or int8, (size,). scales: float32, (blocks,); zero for a block of zeros.
        Of int8, a value is off by at most half a 127th of the largest of its block.
    """
    if form == "fp32":
        return {"values": values}
    blocks = _in_blocks(values, size=BLOCK[form])
    largest = np.abs(blocks).max(axis=1, initial=0.0).astype(np.float64)
    scales = np.where(largest < _LEAST, 0.0, _SCALES[form](largest)).astype(np.float32)
    scaled = blocks / np.where(scales == 0, np.inf, scales).astype(np.float32)[:, None]
    sent = np.rint(scaled).astype(np.int8) if form == "int8" else scaled.astype(np.float16)
    return {"values": sent.reshape(-1)[: len(values)], "scales": scales}


def restored(arrays: Mapping[str, FloatArray]) -> FloatArray:
    """Returns the values that were sent, float32, (size,); the inverse of ``quantised``, but for rounding.

    Raises:
        ValueError: these are no arrays of one form.
    """
    values = arrays["values"]
    form = next((form for form, dtype in DTYPES.items() if dtype == values.dtype), None)
    if form is None or values.ndim != 1:
        raise ValueError("expected one array of float32, float16 or int8")
    if form == "fp32":
        if len(arrays) > 1:
            raise ValueError("expected no scales beside float32")
        return values
    scales = arrays["scales"]
    if scales.dtype != np.float32 or scales.shape != (num_scales(len(values), form=form),):
        raise ValueError("expected a float32 scale for each block")
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise ValueError("expected scales that are finite and not negative")
    blocks = _in_blocks(values.astype(np.float32), size=BLOCK[form])
    with np.errstate(over="ignore", invalid="ignore"):
        found: FloatArray = (blocks * scales[:, None]).reshape(-1)[: len(values)]
    return found


def carried(values: FloatArray, *, form: Form) -> FloatArray:
    """Returns what arrives when values are sent; sent again, it arrives unchanged."""
    return restored(quantised(values, form=form))


def num_scales(size: int, *, form: Form) -> int:
    """Returns how many scales go with so many values."""
    return 0 if form == "fp32" else math.ceil(size / BLOCK[form])


def largest_gain(form: Form) -> float:
    """Returns by how much quantisation with error feedback can lengthen what is sent, at most.

    What rounding takes from an array is at most ``error`` times as long as the array; what was taken before
    is added to it, so a site holds back at most ``error / (1 - error)`` times its longest update.
    """
    if form == "fp32":
        return 1.0
    error = {"int8": math.sqrt(BLOCK["int8"]) * (1 + 2**-11) / (2 * _LEVELS), "fp16": 2.0**-10}[form]
    return (1 + error) * (1 + error / (1 - error))


def _in_blocks(values: FloatArray, *, size: int) -> FloatArray:
    blocks = np.zeros((math.ceil(len(values) / size), size), values.dtype)
    blocks.reshape(-1)[: len(values)] = values
    return blocks


def _int8_scales(largest: FloatArray) -> FloatArray:
    """A 127th of the largest value, rounded up to 12 bits: a product with 127 is exact in float32."""
    mantissa, exponent = np.frexp(largest / _LEVELS)
    scales: FloatArray = np.ldexp(np.ceil(mantissa * 2**12) / 2**12, exponent)
    return scales


def _fp16_scales(largest: FloatArray) -> FloatArray:
    """The power of two that brings the largest value, as float16 rounds it, below 2^15."""
    mantissa, exponent = np.frexp(largest)
    rounds_up = mantissa.astype(np.float16) == 1
    scales: FloatArray = np.ldexp(1.0, exponent + rounds_up - 15)
    return scales


_SCALES = {"int8": _int8_scales, "fp16": _fp16_scales}
