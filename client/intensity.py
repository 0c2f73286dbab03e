"""Steps of preprocessing that change intensities; each sees one image of a case alone.

Colours are scaled together, by one rule for all three, so that the tint of an image stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client import contrast, denoising
from common.errors import UnusableCase
from common.steps import (
    Clahe,
    Gamma,
    Gaussian,
    HistogramNormalisation,
    Landmarks,
    Median,
    NonLocalMeans,
    Percentile,
    Step,
    Window,
    ZScore,
)


def changed(image: np.ndarray, step: Step) -> np.ndarray:
    """Returns an image, float32 (channels, *spatial), after a step.

    Raises:
        UnusableCase: ``no_contrast`` if the image has one value where the step needs several.
    """
    match step:
        case Median():
            return denoising.median(image, radius_pixels=step.radius_pixels)
        case Gaussian():
            return denoising.gaussian(image, sigma_pixels=step.sigma_pixels)
        case NonLocalMeans():
            return denoising.non_local_means(image, step)
        case Window():
            return between(image, step.lower, step.upper)
        case Percentile():
            low, high = _percentiles(image, (step.lower, step.upper))
            return between(image, low, high)
        case ZScore():
            return _standardised(image, limit=step.limit)
        case Landmarks():
            return _mapped(image, step)
        case Clahe():
            return contrast.equalised_in_tiles(image, step)
        case HistogramNormalisation():
            return contrast.equalised(image, bins=step.bins)
        case Gamma():
            return contrast.raised(image, gamma=step.gamma)
    raise ValueError(f"expected a step on intensities, found {step.name}")


def between(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scales what lies from ``low`` to ``high`` to [0, 1] and clips the rest: float32.

    The same bits as MONAI's ``ScaleIntensityRange``, in a third of its time and without its import.

    Raises:
        UnusableCase: ``no_contrast`` if the two are one.
    """
    floats = np.finfo(np.float32)
    if not floats.tiny <= high - low <= floats.max:
        raise UnusableCase("no_contrast", "Expected two distinct intensities, found one or infinity.")
    with np.errstate(over="ignore"):  # infinity is clipped below
        scaled = np.subtract(image, np.float32(low), dtype=np.float32)
    scaled /= np.float32(high - low)
    return np.asarray(np.clip(scaled, 0, 1, out=scaled))


def _standardised(image: np.ndarray, *, limit: float) -> np.ndarray:
    mean = float(image.mean(dtype=np.float64))  # exact where all values are one, so that reach is 0
    reach = limit * float(image.std(dtype=np.float64))
    return between(image, mean - reach, mean + reach)


def _mapped(image: np.ndarray, step: Landmarks) -> np.ndarray:
    places = _percentiles(image, step.percentiles)
    if not (np.isfinite(places).all() and places[-1] > places[0]):
        raise UnusableCase("no_contrast", "Expected distinct percentiles, found one value or infinity.")
    # equal percentiles are a jump; numpy.interp takes the last of them
    return np.asarray(np.interp(image, places, step.values), dtype=np.float32)


def _percentiles(image: np.ndarray, percents: Sequence[float]) -> list[float]:
    with np.errstate(over="ignore", invalid="ignore"):  # between values that no image has; refused by callers
        return [float(place) for place in np.percentile(image, percents)]
