"""What a plan asks of a case: grey or colour, intensity between two bounds, one size, uint8."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UnusableCase
from common.plan import Preprocessing

if TYPE_CHECKING:  # image decoders are imported where a case is decoded
    from client.images import Image

VERSION = 1  # to be raised with every change of the values that apply() returns
LIBRARIES = (
    *("monai", "torch", "numpy", "pydicom", "nibabel", "pillow"),
    *("pylibjpeg-openjpeg", "pyjpegls", "python-gdcm"),
)
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG and DICOM's YBR have it


@cache
def software() -> tuple[str, ...]:
    """Returns the versions on which the values of a preprocessed case depend."""
    return (str(VERSION), *(f"{name}=={importlib.metadata.version(name)}" for name in LIBRARIES))


def apply(image: Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the case as the plan wants it: uint8, (channels, height, width), 255 stands for 1.0.

    Colour becomes grey by luminance; intensities are scaled between two percentiles of the image itself
    (of all channels together) or two fixed values, and clipped; the size is changed bilinearly, with
    antialiasing where it shrinks; grey is repeated for three channels. The same image gives the same bytes.

    Raises:
        UnusableCase: ``no_contrast`` if both percentiles are the same value.
    """
    array = image.array
    if array.shape[0] == 3 and preprocessing.channels == 1:
        array = np.tensordot(LUMINANCE, array, axes=1)[None]
    array = _resized(_scaled(array, preprocessing), preprocessing.size)
    pixels = np.rint(array * 255).astype(np.uint8)
    return np.repeat(pixels, preprocessing.channels // pixels.shape[0], axis=0)


def _scaled(array: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    from monai.transforms import ScaleIntensityRange  # takes seconds, and a warm start does without

    low, high = preprocessing.lower, preprocessing.upper
    if preprocessing.scaling == "percentile":
        low, high = (float(value) for value in np.percentile(array, (low, high)))
    if not high > low:
        raise UnusableCase("no_contrast", f"Expected distinct percentiles, found {low} twice.")
    scale = ScaleIntensityRange(a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)
    return np.asarray(scale(array), dtype=np.float32)


def _resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes with a triangle filter as wide as a target pixel.

    Not MONAI's Resize: its antialiasing pads with zeros and darkens the border of every image.
    """
    import torch  # takes seconds, and a warm start does without

    tensor = torch.from_numpy(np.ascontiguousarray(array))[None]
    resized = torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", antialias=True)
    return np.asarray(np.clip(resized[0].numpy(), 0, 1))
