"""The steps of preprocessing that a plan may name, as values; ``client/preprocessing.py`` does them.

A step sees one case alone. Lengths are in pixels of the case as it is at that step, unless they are said to
be in mm. Steps on intensities treat each image of a case by itself; steps on places treat all of them, and
the mask, alike. ``docs/preprocessing.md`` says what each step is for.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.value import Value

MAX_WINDOW = 33**2
"""Pixels that a filter may look at for each of an image's; more would take hours."""

Radius = Annotated[int, Field(ge=1, le=16)]
Intensity = Annotated[float, Field(ge=-1e30, le=1e30)]
SpacingMm = Annotated[float, Field(ge=0.01, le=100)]
Percent = Annotated[float, Field(ge=0, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Median(Value):
    """Each value becomes the median of the square or cube about it."""

    name: Literal["median"]
    radius_pixels: Radius

    def num_pixels(self, dimensions: int) -> int:
        """Pixels of the square or cube."""
        return int((2 * self.radius_pixels + 1) ** dimensions)


class Gaussian(Value):
    """Smooths with a Gaussian of this standard deviation."""

    name: Literal["gaussian"]
    sigma_pixels: Annotated[float, Field(gt=0, le=16)]


class NonLocalMeans(Value):
    """Averages over places whose patches look alike (Buades et al. 2005); ``strength`` is in standard
    deviations of the noise, which is estimated from the image."""

    name: Literal["non_local_means"]
    patch_radius_pixels: Annotated[int, Field(ge=1, le=5)]
    search_radius_pixels: Annotated[int, Field(ge=1, le=11)]
    strength: Annotated[float, Field(gt=0, le=10)]

    def num_pixels(self, dimensions: int) -> int:
        """Pixels that are searched for each."""
        return int((2 * self.search_radius_pixels + 1) ** dimensions)


class Percentile(Value):
    """Scales what lies between two percentiles of the image itself to [0, 1]; clips the rest."""

    name: Literal["percentile"]
    lower: Percent
    upper: Percent

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        _check_ordered(self.lower, self.upper)
        return self


class Window(Value):
    """Scales what lies between two intensities, such as Hounsfield units, to [0, 1]; clips the rest."""

    name: Literal["window"]
    lower: Intensity
    upper: Intensity

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        _check_ordered(self.lower, self.upper)
        return self


class ZScore(Value):
    """Scales ``limit`` standard deviations about the image's mean to [0, 1]; clips the rest."""

    name: Literal["z_score"]
    limit: Annotated[float, Field(gt=0, le=100)]


class Landmarks(Value):
    """Maps percentiles of the image itself to values in [0, 1], linearly between them.

    The values are the same at every site, and each image is judged by itself alone. They come from a run of
    ``plan=landmarks`` (``common/landmarks.py``), or from elsewhere.

    Source: Nyul, Udupa and Zhang (2000), New Variants of a Method of MRI Scale Standardization.
    """

    name: Literal["landmarks"]
    percentiles: Annotated[tuple[Percent, ...], Field(min_length=2, max_length=101)]
    values: Annotated[tuple[Fraction, ...], Field(min_length=2, max_length=101)]

    @model_validator(mode="after")
    def _is_a_map(self) -> Self:
        if len(self.percentiles) != len(self.values):
            raise ValueError("expected as many values as percentiles")
        for given in (self.percentiles, self.values):
            if any(second <= first for first, second in zip(given, given[1:], strict=False)):
                raise ValueError(f"expected percentiles and values that increase, found {list(given)}")
        return self


class Clahe(Value):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994); needs values in [0, 1].

    ``clip_limit`` is the largest part of a tile's pixels that counts for one grey value, 1 for no limit;
    ``tile_fraction`` the length of a tile over that of the image, along each axis.
    """

    name: Literal["clahe"]
    clip_limit: Annotated[float, Field(gt=0, le=1)]
    tile_fraction: Annotated[float, Field(ge=1 / 16, le=1)]


class HistogramNormalisation(Value):
    """Makes all values of the image equally frequent; needs values in [0, 1]."""

    name: Literal["histogram_normalisation"]
    bins: Annotated[int, Field(ge=2, le=65536)]


class Gamma(Value):
    """Raises values to a power; needs values in [0, 1]."""

    name: Literal["gamma"]
    gamma: Annotated[float, Field(gt=0, le=10)]


class Resample(Value):
    """Changes the distance of pixels, in mm, along each axis; a case without spacing is refused."""

    name: Literal["resample"]
    spacing_mm: Annotated[tuple[SpacingMm, ...], Field(min_length=2, max_length=3)]


class CropForeground(Value):
    """Cuts to the smallest box that holds all values above ``above``, and a margin about it.

    Before the scaling to [0, 1] ``above`` is in units of the file, such as Hounsfield units.
    """

    name: Literal["crop_foreground"]
    above: Intensity
    margin_pixels: Annotated[int, Field(ge=0, le=256)]


class Resize(Value):
    """Changes the size to that which the plan asks for; antialiased where it shrinks."""

    name: Literal["resize"]


class PadOrCrop(Value):
    """Changes the size to that which the plan asks for, about the centre, without changing the distance of
    pixels; pads with 0, so needs values in [0, 1]. Masks are padded with the background."""

    name: Literal["pad_or_crop"]


Denoising = Median | Gaussian | NonLocalMeans
Scaling = Percentile | Window | ZScore | Landmarks
OnUnitRange = Clahe | HistogramNormalisation | Gamma | PadOrCrop
Sizing = Resize | PadOrCrop
Spatial = Resample | CropForeground | Resize | PadOrCrop
InPixels = Median | Gaussian | NonLocalMeans | CropForeground | PadOrCrop

Step = Annotated[
    Denoising | Scaling | Clahe | HistogramNormalisation | Gamma | Spatial, Field(discriminator="name")
]


def _check_ordered(lower: float, upper: float) -> None:
    if lower >= upper:
        raise ValueError(f"expected lower < upper, found {lower} and {upper}")
