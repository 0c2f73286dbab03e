"""From the stored values of grey DICOM pixels to what they mean: modality, window, polarity, padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, apply_voi

from common.errors import UnusableCase


def shown(stored: np.ndarray, *, dataset: pydicom.Dataset) -> np.ndarray:
    """Returns what a viewer would show of one frame, float32: bright is dense.

    The modality LUT or rescale is applied, then the first VOI LUT, or else the first window, whose output
    spans the range of the stored values as the standard has it; MONOCHROME1 is inverted within that
    range; padding takes the darkest value.
    """
    values, low, high = modality(stored, dataset=dataset)
    values, low, high = _voi(values, low, high, dataset=dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = (low + high) - values
    padded = padding(stored, dataset=dataset)
    if padded.any() and not padded.all():
        values[padded] = values[~padded].min()
    return values.astype(np.float32, copy=False)


def modality(stored: np.ndarray, *, dataset: pydicom.Dataset) -> tuple[np.ndarray, float, float]:
    """Returns the modality's values and the range that they can take."""
    kind: type[Any] = np.float32 if stored.dtype.itemsize <= 2 else np.float64
    if dataset.get("ModalityLUTSequence"):
        bits = dataset.ModalityLUTSequence[0].LUTDescriptor[2]
        return apply_modality_lut(stored, dataset).astype(kind), 0.0, 2.0**bits - 1
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if (slope is None) != (intercept is None) or slope == 0:
        raise UnusableCase("bad_rescale", f"Expected slope and intercept, found {slope} and {intercept}.")
    if slope is None or intercept is None:
        slope, intercept = 1.0, 0.0
    signed, bits = dataset.PixelRepresentation == 1, dataset.BitsStored
    ends = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    low, high = sorted(end * slope + intercept for end in ends)
    values: np.ndarray = stored.astype(kind)
    if slope != 1:
        values *= kind(slope)
    if intercept != 0:
        values += kind(intercept)
    return values, low, high


def _voi(
    values: np.ndarray, low: float, high: float, *, dataset: pydicom.Dataset
) -> tuple[np.ndarray, float, float]:
    """Applies the first VOI LUT, else the first window; returns the new values and their range."""
    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        mapped = apply_voi(np.rint(values).astype(np.int64), dataset, 0)
        return mapped.astype(values.dtype), 0.0, 2.0**bits - 1
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if centre is None and width is None:
        return values, low, high
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    fraction = _windowed(values, centre=centre, width=width, function=function)
    return fraction * values.dtype.type(high - low) + values.dtype.type(low), low, high


def _windowed(values: np.ndarray, *, centre: float | None, width: float | None, function: str) -> np.ndarray:
    """Returns values in [0, 1] by PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    least = 1 if function == "LINEAR" else 0
    if centre is None or width is None or width < least or width <= 0:
        raise UnusableCase("bad_window", f"Expected a window, found centre {centre}, width {width}.")
    kind: type[Any] = values.dtype.type
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
        if width == 0:
            return (values > centre).astype(kind)
    if function in ("LINEAR", "LINEAR_EXACT"):
        return np.asarray(np.clip((values - kind(centre)) / kind(width) + kind(0.5), 0, 1))
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(kind(-4) * (values - kind(centre)) / kind(width))))
    raise UnusableCase("bad_window", "Expected LINEAR, LINEAR_EXACT or SIGMOID, found another function.")


def padding(stored: np.ndarray, *, dataset: pydicom.Dataset) -> np.ndarray:
    """Returns which stored values are padding and no part of the image; bool, the shape of ``stored``."""
    first, limit = _number(dataset, "PixelPaddingValue"), _number(dataset, "PixelPaddingRangeLimit")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = first if limit is None else limit
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """Returns the first value of a numeric tag; None where it is absent or empty."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number):
        raise UnusableCase("incomplete_header", f"Expected a finite {keyword}, found {number}.")
    return number
