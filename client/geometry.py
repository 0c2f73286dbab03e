"""Steps of preprocessing that move pixels; all images of a case and its mask are moved alike."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from client.image import MAX_PIXELS, MAX_VOXELS, check_size
from client.picture import Picture
from common.errors import UnusableCase
from common.steps import CropForeground, PadOrCrop, Resample, Resize, Spatial


def moved(picture: Picture, step: Spatial, *, size: tuple[int, ...]) -> Picture:
    """Returns a case after a step.

    Args:
        size: which the steps ``resize`` and ``pad_or_crop`` make.

    Raises:
        UnusableCase: ``no_spacing`` or ``too_large`` in resampling, ``no_foreground`` in cropping.
    """
    match step:
        case Resample():
            return resampled(picture, spacing_mm=step.spacing_mm)
        case CropForeground():
            return cropped(picture, above=step.above, margin_pixels=step.margin_pixels)
        case Resize():
            return resized(picture, size)
        case PadOrCrop():
            return padded_or_cropped(picture, size)


def resampled(picture: Picture, *, spacing_mm: tuple[float, ...]) -> Picture:
    """Returns a case with this spacing, as nearly as a whole number of pixels over the same place allows.

    Raises:
        UnusableCase: ``no_spacing``; ``too_large`` if there would be more pixels than any file may have.
    """
    if picture.spacing_mm is None:
        raise UnusableCase("no_spacing", "Expected a spacing to resample from, found none.")
    most = MAX_PIXELS if len(spacing_mm) == 2 else MAX_VOXELS
    lengths = zip(picture.images[0].shape[1:], picture.spacing_mm, spacing_mm, strict=True)
    size = tuple(max(1, round(min(old * mm / wanted, most + 1))) for old, mm, wanted in lengths)
    check_size(size, most=most)
    return resized(picture, size)


def cropped(picture: Picture, *, above: float, margin_pixels: int) -> Picture:
    """Returns the smallest box with all pixels of any image that are above ``above``, and a margin about it.

    The margin ends where the image does.

    Raises:
        UnusableCase: ``no_foreground``.
    """
    foreground = np.logical_or.reduce([(image > above).any(axis=0) for image in picture.images])
    if not foreground.any():
        raise UnusableCase("no_foreground", "Expected pixels above the threshold, found none.")
    box = tuple(_extent(foreground, axis, margin=margin_pixels) for axis in range(foreground.ndim))
    return replace(
        picture,
        images=tuple(image[:, *box] for image in picture.images),
        mask=None if picture.mask is None else picture.mask[box],
    )


def _extent(foreground: np.ndarray, axis: int, *, margin: int) -> slice:
    others = tuple(other for other in range(foreground.ndim) if other != axis)
    places = np.flatnonzero(foreground.any(axis=others))
    return slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin)


def padded_or_cropped(picture: Picture, size: tuple[int, ...]) -> Picture:
    """Returns a case of another size about the same centre, 0 where it had no pixels."""
    return replace(
        picture,
        images=tuple(np.stack([_centred(channel, size) for channel in image]) for image in picture.images),
        mask=None if picture.mask is None else _centred(picture.mask, size),
    )


def _centred(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    pairs = list(zip(array.shape, size, strict=True))
    cuts = [max(0, old - new) // 2 for old, new in pairs]
    part = array[tuple(slice(cut, cut + new) for cut, (_, new) in zip(cuts, pairs, strict=True))]
    missing = [max(0, new - old) for old, new in pairs]
    return np.pad(part, [(short // 2, short - short // 2) for short in missing])


def resized(picture: Picture, size: tuple[int, ...]) -> Picture:
    """Returns a case of another size that covers the same place."""
    before = picture.images[0].shape[1:]
    spacing = picture.spacing_mm
    if spacing is not None:
        spacing = tuple(mm * old / new for mm, old, new in zip(spacing, before, size, strict=True))
    return replace(
        picture,
        images=tuple(_linear(image, size) for image in picture.images),
        mask=None if picture.mask is None else _nearest(picture.mask, size),
        spacing_mm=spacing,
    )


def _linear(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Interpolates linearly, with a triangle filter as wide as a target pixel where it shrinks.

    Not MONAI's Resize: its antialiasing pads with zeros and darkens the border of every image. One axis after
    the other, which is the same since the filter is a product of one for each axis; those that shrink first,
    so that nothing on the way is larger than the image or the result.
    """
    low, high = float(image.min()), float(image.max())
    axes = [axis for axis in range(1, image.ndim) if image.shape[axis] != size[axis - 1]]
    for axis in sorted(axes, key=lambda axis: (size[axis - 1] > image.shape[axis], -axis)):
        image = _along(image, axis, size[axis - 1])
    return np.asarray(np.clip(image, low, high))


def _along(image: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Interpolates along one axis, with the others taken together to an image of few."""
    import torch  # takes seconds, and a warm start does without
    from torch.nn import functional

    before, after = math.prod(image.shape[:axis]), math.prod(image.shape[axis + 1 :])
    rows = before if after == 1 else image.shape[axis]
    stack, width = (1, image.shape[axis]) if after == 1 else (before, after)
    planes = torch.from_numpy(np.ascontiguousarray(image)).reshape(1, stack, rows, width)
    wanted = (rows, length) if after == 1 else (length, width)
    found = functional.interpolate(planes, size=wanted, mode="bilinear", antialias=True)
    return found.numpy().reshape(*image.shape[:axis], length, *image.shape[axis + 1 :])


def _nearest(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Takes for each new pixel the old one about its centre, since numbers of classes cannot be averaged."""
    grid = [
        np.minimum((np.arange(new) + 0.5) * old // new, old - 1).astype(np.intp)
        for old, new in zip(mask.shape, size, strict=True)
    ]
    return mask[np.ix_(*grid)]
