"""What a plan asks of a case: its images as one array with values in [0, 1], step by step, and its mask."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from client import geometry, intensity
from client.picture import Picture
from common.asked import Asked, Preprocessing
from common.errors import UnusableCase
from common.steps import Spatial, Step

if TYPE_CHECKING:  # image decoders are imported where a case is decoded
    from client.images import Image

VERSION = 4  # to be raised with every change of the values that apply() returns
LIBRARIES = (
    *("monai", "torch", "numpy", "scipy", "scikit-image", "pydicom", "nibabel", "pillow"),
    *("pylibjpeg-openjpeg", "pyjpegls", "python-gdcm"),
)
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG and DICOM's YBR have it
AFFINE_TOLERANCE = 0.1  # of a pixel, at the corner that is farthest off


@cache
def software() -> tuple[str, ...]:
    """Returns the versions on which the values of a preprocessed case depend."""
    return (str(VERSION), *(f"{name}=={importlib.metadata.version(name)}" for name in LIBRARIES))


def record_type(asked: Asked) -> np.dtype[Any]:
    """Returns the type of a preprocessed case.

    ``image``: uint8 or float16, (channels, *size); 255, or 1.0, stands for 1. ``mask``, where the plan's
    target is one: uint8, size, the number of each pixel's class.
    """
    preprocessing = asked.preprocessing
    shape = (preprocessing.num_channels, *preprocessing.size)
    fields: list[Any] = [("image", preprocessing.precision, shape)]
    if asked.target == "mask":
        fields.append(("mask", np.uint8, preprocessing.size))
    return np.dtype(fields)


def apply(images: Sequence[Image], asked: Asked, *, mask: Image | None = None) -> np.ndarray:
    """Returns a case as the plan wants it: a record of ``record_type``, of shape ().

    Colour becomes grey by luminance where the plan wants grey; then the steps are done in their order; grey
    is repeated for three channels. The same files give the same bytes.

    Raises:
        UnusableCase: the images do not fit the plan, each other or the mask; a step cannot be done.
    """
    preprocessing = asked.preprocessing
    picture = _together(images, mask, channels=preprocessing.channels, dimensions=len(preprocessing.size))
    for step in preprocessing.steps:
        picture = _done(step, picture, size=preprocessing.size)
    record = np.zeros((), record_type(asked))
    record["image"] = _stored(picture.images, preprocessing)
    if asked.target == "mask":
        record["mask"] = _numbers(picture.mask, num_classes=len(asked.classes))
    return record


def _together(images: Sequence[Image], mask: Image | None, *, channels: int, dimensions: int) -> Picture:
    first = images[0]
    for image in images:
        _check_dimensions(image, dimensions)
        if not _is_same_grid(image, first):
            raise UnusableCase("mismatched_inputs", "Expected images of one grid, found several.")
    if mask is not None and not _is_same_grid(mask, first):
        raise UnusableCase("mismatched_mask", "Expected a mask on the grid of its image, found another.")
    return Picture(
        images=tuple(_grey(image.array) if channels == 1 else image.array for image in images),
        mask=None if mask is None else mask.array[0],
        spacing_mm=first.spacing_mm,
    )


def _check_dimensions(image: Image, dimensions: int) -> None:
    found = image.array.ndim - 1
    if found > dimensions:
        raise UnusableCase("three_dimensional", "Expected one slice, found a volume.")
    if found < dimensions:
        raise UnusableCase("two_dimensional", "Expected a volume, found one slice.")


def _is_same_grid(image: Image, other: Image) -> bool:
    """Returns whether two images have one size and, where both say where they lie, one place: no pixel is
    farther off than a small part of the smallest spacing. The farthest off is at a corner."""
    if image.array.shape[1:] != other.array.shape[1:]:
        return False
    if image.affine is None or other.affine is None:
        return True
    corners = np.array([*itertools.product(*((0, length - 1) for length in image.array.shape[1:]))])
    apart = image.affine - other.affine
    apart_mm = np.linalg.norm(corners @ apart[:3, :3].T + apart[:3, 3], axis=1).max()
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0).min()
    return bool(apart_mm <= AFFINE_TOLERANCE * spacing_mm)


def _grey(array: np.ndarray) -> np.ndarray:
    return array if array.shape[0] == 1 else np.tensordot(LUMINANCE, array, axes=1)[None]


def _done(step: Step, picture: Picture, *, size: tuple[int, ...]) -> Picture:
    if isinstance(step, Spatial):
        return geometry.moved(picture, step, size=size)
    return replace(picture, images=tuple(intensity.changed(image, step) for image in picture.images))


def _stored(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> np.ndarray:
    repeated = [np.repeat(image, preprocessing.channels // image.shape[0], axis=0) for image in images]
    array = np.concatenate(repeated)
    return np.rint(array * 255) if preprocessing.precision == "uint8" else array


def _numbers(mask: np.ndarray | None, *, num_classes: int) -> np.ndarray:
    if mask is None:
        raise UnusableCase("missing_mask", "Expected a mask, found none.")
    if not np.isin(mask, np.arange(num_classes)).all():
        raise UnusableCase("bad_mask", f"Expected the numbers of {num_classes} classes, found others.")
    return mask.astype(np.uint8)
