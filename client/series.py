"""DICOM images of one case: a single picture, the frames of one file, or a series of files as a volume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut

from client import dicom, grey, volume
from client.image import MAX_VOXELS, Image, check_size, checked_spacing
from common.errors import UnusableCase

ALIKE = (  # what the slices of a volume have in common, with the code for those that do not
    ("several_series", ("SeriesInstanceUID",)),
    ("mixed_kind", ("SOPClassUID",)),
    ("mixed_size", ("Rows", "Columns")),
    ("mixed_pixel_type", ("PhotometricInterpretation", "BitsAllocated", "PixelRepresentation")),
)
Frame = tuple[pydicom.Dataset, np.ndarray]


def read_file(content: bytes) -> Image:
    """Decodes one DICOM file: a picture, or a volume where it has several frames with their places.

    Pictures: grey as ``grey.shown`` has it; colour (RGB, YBR, palette) becomes RGB as stored, without window.
    """
    dataset = dicom.opened(content)
    if dicom.num_frames(dataset) == 1:
        return _picture(dicom.pixels(dataset, content=content), dataset=dataset)
    headers = dicom.frames(dataset)
    order, affine = _arranged(headers)
    stored = dicom.pixels(dataset, content=content)
    return _assembled(((headers[index], stored[index]) for index in order), headers=headers, affine=affine)


def read(contents: Sequence[bytes]) -> Image:
    """Assembles the files of one series, each with one frame, into a volume; their order does not matter.

    Raises:
        UnusableCase: they are not all of one series, or their slices do not make a volume.
    """
    if not all(map(dicom.is_dicom, contents)):
        raise UnusableCase("foreign_file", "Expected only DICOM files in the folder, found others.")
    headers = [dicom.opened(content) for content in contents]
    if any(dicom.num_frames(header) != 1 for header in headers):
        raise UnusableCase("multi_frame", "Expected one frame in each file of a series, found several.")
    if len(set(contents)) < len(contents):
        raise UnusableCase("repeated_slices", "Expected every file once, found copies.")
    order, affine = _arranged(headers)
    frames = ((headers[index], _once(headers[index], content=contents[index])) for index in order)
    return _assembled(frames, headers=headers, affine=affine)


def _once(header: pydicom.Dataset, *, content: bytes) -> np.ndarray:
    stored = dicom.pixels(header, content=content)
    del header.PixelData  # a series is large, and its pixels are needed once
    return stored


def _picture(stored: np.ndarray, *, dataset: pydicom.Dataset) -> Image:
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if photometric in dicom.GREY:
        array = grey.shown(stored, dataset=dataset)[None]
    else:
        array = np.ascontiguousarray(np.moveaxis(stored[..., :3], -1, 0), dtype=np.float32)
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    return Image(array=array, spacing_mm=checked_spacing(spacing))


def _arranged(headers: Sequence[pydicom.Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of slices and the affine of their volume, before any pixel is decoded."""
    for code, keywords in ALIKE:
        if len({tuple(str(header.get(keyword)) for keyword in keywords) for header in headers}) > 1:
            raise UnusableCase(code, f"Expected one value of {' and '.join(keywords)}, found several.")
    first = headers[0]
    if first.PhotometricInterpretation not in dicom.GREY:
        raise UnusableCase("unsupported_photometric", "Expected a volume in grey, found colour.")
    check_size((len(headers), first.Rows, first.Columns), most=MAX_VOXELS)
    return volume.stacked([_plane(header) for header in headers])


def _plane(header: pydicom.Dataset) -> volume.Plane:
    position, directions, _ = (_numbers(header.get(keyword)) for keyword in dicom.PLACE)
    spacing = checked_spacing(header.get("PixelSpacing"))
    if (len(position), len(directions), len(spacing or ())) != (3, 6, 2):
        raise UnusableCase("no_position", "Expected position, orientation and spacing, found one missing.")
    return volume.Plane(position_mm=position, directions=directions, spacing_mm=spacing or ())


def _numbers(value: Any) -> tuple[float, ...]:
    if value is None or isinstance(value, str | float | int):
        return ()
    numbers = tuple(float(one) for one in value)
    return numbers if all(map(math.isfinite, numbers)) else ()


def _assembled(frames: Iterable[Frame], *, headers: Sequence[pydicom.Dataset], affine: np.ndarray) -> Image:
    """Returns the volume of frames in their order, in units after rescale, without any window.

    The rescale may differ from slice to slice. MONOCHROME1 is inverted within the range that the slices
    can take together, and padding takes the darkest value of the volume.
    """
    first = headers[0]
    voxels = np.empty((len(headers), first.Rows, first.Columns), np.float32)
    ends, padded = [], {}
    for index, (header, stored) in enumerate(frames):
        voxels[index], *range_ = grey.modality(stored, dataset=header)
        ends += range_
        mask = grey.padding(stored, dataset=header)
        if mask.any():
            padded[index] = mask
    if first.PhotometricInterpretation == "MONOCHROME1":
        voxels = np.float32(min(ends) + max(ends)) - voxels
    _darken(voxels, padded)
    return volume.turned(voxels.transpose(2, 1, 0), affine)


def _darken(voxels: np.ndarray, padded: dict[int, np.ndarray]) -> None:
    if not padded:
        return
    mask = np.zeros(voxels.shape, bool)
    for index, where in padded.items():
        mask[index] = where
    if not mask.all():
        voxels[mask] = voxels[~mask].min()
