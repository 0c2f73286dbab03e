"""One image or volume of a case, as every reader returns it, and the limits of what is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UnusableCase

MAX_PIXELS = 2**26  # the largest radiographs (mammography, 16-bit) have about 2**25
MAX_VOXELS = 2**28  # a thousand slices of 512 by 512; 1 GiB of float32


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image or volume of a case.

    Attributes:
        array: float32, (channels, *spatial); 1 channel or 3 (red, green, blue). In two dimensions the
            spatial axes are rows downwards and columns to the right, as the picture is looked at; in
            grey images bright is dense, and units are those of the file after rescale and window. In
            three dimensions the axes run to the patient's right, anterior and superior, as nearly as
            permuting and flipping them allows, and units are those of the file after rescale.
        spacing_mm: distance of pixel centres along each spatial axis, None where the file has none.
        affine: float64, (4, 4), from the indices of a volume's spatial axes to millimetres towards
            right, anterior and superior; None in two dimensions.
    """

    array: np.ndarray
    spacing_mm: tuple[float, ...] | None
    affine: np.ndarray | None = None


def check_size(shape: tuple[int, ...], *, most: int | None = None) -> None:
    """Refuses a declared size before anything of that size is made.

    Raises:
        UnusableCase: ``unreadable`` or ``too_large``.
    """
    most = MAX_PIXELS if most is None else most
    if any(length < 1 for length in shape):
        raise UnusableCase("unreadable", f"Expected a positive size, found {shape}.")
    if math.prod(shape) > most:
        raise UnusableCase("too_large", f"Expected at most {most} pixels, found {shape}.")


def checked_spacing(values: Any) -> tuple[float, ...] | None:
    """Returns a spacing in millimetres; None where there is none.

    Raises:
        UnusableCase: ``bad_spacing``.
    """
    if values is None or values == "" or len(values) == 0:
        return None
    spacing = tuple(float(value) for value in values)
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise UnusableCase("bad_spacing", f"Expected spacing_mm > 0, found {spacing}.")
    return spacing
