"""Contrast of one image with values in [0, 1]: float32 (channels, *spatial) in and out."""

from __future__ import annotations

import numpy as np

from common.errors import UnusableCase
from common.steps import Clahe

_GREYS = 256
"""Bins of a tile's histogram in CLAHE."""


def equalised_in_tiles(image: np.ndarray, step: Clahe) -> np.ndarray:
    """Makes the values of each tile more equally frequent, no value more often than the limit lets it.

    The result goes from 0 to 1. Of colours the brightest is changed and the others with it, so hue and
    saturation stay (as in the colour space HSV).

    Source: Zuiderveld (1994), Contrast Limited Adaptive Histogram Equalization.

    Raises:
        UnusableCase: ``no_contrast`` if the image has one value.
    """
    from skimage import exposure  # where it is needed: takes a third of a second

    _check_contrast(image)
    bright = image.max(axis=0)
    tile = [max(1, round(step.tile_fraction * length)) for length in bright.shape]
    if bright.ndim == 3 and bright.shape[-1] in (3, 4):  # taken for colours unless there is one more axis
        bright, tile = bright[None], [1, *tile]
    clear = exposure.equalize_adapthist(bright, kernel_size=tile, clip_limit=step.clip_limit, nbins=_GREYS)
    clear = clear.reshape(image.shape[1:]).astype(np.float32)
    _check_contrast(clear)  # differences below 1 in 65535 are lost
    return clear[None] if len(image) == 1 else _brightened(image, clear)


def _brightened(image: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Scales colours so that the largest of them becomes ``bright``, (*spatial); black becomes grey."""
    before = image.max(axis=0)
    factor = np.divide(bright, before, out=np.zeros_like(bright), where=before > 0)
    return np.clip(np.where(before > 0, image * factor, bright), 0, 1)


def equalised(image: np.ndarray, *, bins: int) -> np.ndarray:
    """Makes all values about equally frequent, by one map for all colours; the result goes from 0 to 1.

    Raises:
        UnusableCase: ``no_contrast`` if the image has one value.
    """
    from monai.transforms import HistogramNormalize  # takes seconds

    _check_contrast(image)
    normalise = HistogramNormalize(num_bins=bins, min=0, max=1)
    return np.asarray(normalise(image), dtype=np.float32)


def raised(image: np.ndarray, *, gamma: float) -> np.ndarray:
    """Returns value ** gamma; not MONAI's AdjustContrast, which goes by the image's own darkest and brightest
    pixel."""
    return np.asarray(np.power(image, np.float32(gamma)))


def _check_contrast(image: np.ndarray) -> None:
    if image.min() == image.max():
        raise UnusableCase("no_contrast", "Expected distinct intensities, found one value.")
