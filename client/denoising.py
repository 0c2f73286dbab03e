"""Denoising of one image: float32 (channels, *spatial) in and out, in two or three dimensions.

Beyond the border an image goes on as it ends; MONAI's filters set zeros there, which darkens it. Every filter
keeps to the range of intensities that the image has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from common.steps import NonLocalMeans

_MEDIAN_OF_NORMAL = 0.6744897501960817
"""Median of the absolute value of a standard normal number: its quantile 3/4."""
_SECOND_DIFFERENCE = math.sqrt(6.0)
"""Standard deviation of a - 2b + c for independent a, b and c of standard deviation 1."""
_LEAST_NOISE = 1e-6
"""Noise below this part of the range is that of the rounding of 32-bit floats."""


def median(image: np.ndarray, *, radius_pixels: int) -> np.ndarray:
    """Returns the median of the square or cube about each value, each colour by itself."""
    from scipy import ndimage  # where it is needed: takes a third of a second

    window = (1, *(2 * radius_pixels + 1,) * (image.ndim - 1))
    return np.asarray(ndimage.median_filter(image, size=window, mode="nearest"))


def gaussian(image: np.ndarray, *, sigma_pixels: float) -> np.ndarray:
    """Returns the image smoothed with a Gaussian that ends at four standard deviations."""
    from scipy import ndimage

    sigmas = (0.0, *(sigma_pixels,) * (image.ndim - 1))
    return _within(ndimage.gaussian_filter(image, sigmas, mode="nearest", truncate=4.0), image)


def non_local_means(image: np.ndarray, step: NonLocalMeans) -> np.ndarray:
    """Returns the mean over the places searched, each weighted by how its patch looks like that of the pixel.

    The weight is exp(-max(0, d - 2 sigma^2) / (strength * sigma)^2), where sigma is ``noise_std`` and d the
    mean squared difference of two patches, over all colours. An image without noise is returned as it is.

    Not scikit-image's fast form, whose patches are an even number of pixels wide and off the centre.

    Source: Buades, Coll and Morel (2011), Non-Local Means Denoising; the order of the sums is that of Darbon
    et al. (2008), Fast Nonlocal Filtering Applied to Electron Cryomicroscopy.
    """
    sigma, low = noise_std(image), float(image.min())
    if sigma <= _LEAST_NOISE * (float(image.max()) - low):
        return image
    reach = step.search_radius_pixels
    by_noise = ((image - np.float64(low)) / sigma).astype(np.float32)
    around = np.pad(by_noise, [(0, 0), *[(reach, reach)] * (image.ndim - 1)], mode="edge")
    means = _means_of_alike(around, step)
    inside = means[:, *(slice(reach, -reach),) * (image.ndim - 1)]
    return _within(inside * np.float64(sigma) + low, image)


def _means_of_alike(image: np.ndarray, step: NonLocalMeans) -> np.ndarray:
    """Does it for an image with noise of standard deviation 1, whose border is repeated beyond the search."""
    total, weights = image.copy(), np.ones(image.shape[1:], np.float32)  # each pixel is like itself
    for shift in _half_of_shifts(step.search_radius_pixels, dimensions=image.ndim - 1):
        here = tuple(slice(max(0, -by), min(0, -by) or None) for by in shift)
        there = tuple(slice(max(0, by), min(0, by) or None) for by in shift)
        differences = np.square(image[:, *here] - image[:, *there]).mean(axis=0)
        excess = np.maximum(_patch_means(differences, radius=step.patch_radius_pixels) - 2, 0)
        weight = np.exp(excess * np.float32(-1 / step.strength**2))
        for place, other in ((here, there), (there, here)):  # a pair is as alike seen from either side
            weights[place] += weight
            total[:, *place] += weight * image[:, *other]
    return np.asarray(total / weights)


def _half_of_shifts(radius: int, *, dimensions: int) -> Iterator[tuple[int, ...]]:
    """Yields one of each pair of opposite shifts, without that of nothing."""
    shifts = product(range(-radius, radius + 1), repeat=dimensions)
    return (shift for shift in shifts if shift > (0,) * dimensions)


def _patch_means(values: np.ndarray, *, radius: int) -> np.ndarray:
    from scipy import ndimage

    return np.asarray(ndimage.uniform_filter(values, size=2 * radius + 1, mode="nearest"))


def noise_std(image: np.ndarray) -> float:
    """Returns the standard deviation of an image's noise, 0 where it has none.

    From the median of second differences along every axis, which structures hardly change; places without
    any, such as a background set to zero, are left out.

    Source: Immerkaer (1996), Fast Noise Variance Estimation; the median as Donoho and Johnstone (1994), Ideal
    Spatial Adaptation by Wavelet Shrinkage.
    """
    axes = [axis for axis in range(1, image.ndim) if image.shape[axis] > 2]
    differences = image.astype(np.float64)
    for axis in axes:
        differences = np.diff(differences, n=2, axis=axis)
    found = np.abs(differences[differences != 0])
    if not axes or not found.size:
        return 0.0
    return float(np.median(found)) / (_MEDIAN_OF_NORMAL * _SECOND_DIFFERENCE ** len(axes))


def _within(filtered: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(filtered, image.min(), image.max()), dtype=np.float32)
