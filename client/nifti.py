"""NIfTI-1 and NIfTI-2 in one file, gzipped or not: a slice as a picture, several as a volume."""

from __future__ import annotations

import gzip
import io
import math
from typing import Any

import nibabel
import numpy as np

from client import volume
from client.image import MAX_PIXELS, MAX_VOXELS, Image, check_size, checked_spacing
from common.errors import UnusableCase

MAX_HEADER_BYTES = 2**24  # header extensions
SPACING_FRACTION = 1e-2  # by which the two spacings that a header states may differ
MM_OF_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron


def is_nifti(content: bytes) -> bool:
    """Tells NIfTI by its magic; that of a header whose image is another file included."""
    return content[344:348] in (b"n+1\0", b"ni1\0") or content[4:8] in (b"n+2\0", b"ni2\0")


def read(content: bytes) -> Image:
    """Decodes one NIfTI file; values are scaled as its header says.

    One slice becomes a picture. Its axes are turned to those of a DICOM image in the standard planes: rows
    run to posterior (axial) or inferior (coronal, sagittal), columns to the patient's left, or posterior in
    sagittal slices; the nearest such plane counts. A slice whose file states no orientation (both codes 0)
    is taken as column and row indices of the picture, as stored; such a volume is refused. Where a file
    states two orientations, the sform counts.

    Raises:
        UnusableCase: see the codes in ``client/quarantine.py``.
    """
    if content[:2] == b"\x1f\x8b":
        content = _inflated(content)
    nifti = _opened(io.BytesIO(content))
    _check_length(nifti, found=len(content))
    shape = _shape(nifti)
    values = np.asanyarray(nifti.dataobj).reshape(shape).astype(np.float32)
    return _upright(values, nifti=nifti) if 1 in shape else _volume(values, nifti=nifti)


def _opened(stream: Any) -> Any:
    """Returns the header, which states a bearable size, before anything of that size is read."""
    head = stream.read(540)
    stream.seek(0)
    if not is_nifti(head):
        raise UnusableCase("unknown_format", "Expected NIfTI in a gzip file, found another format.")
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise UnusableCase("unknown_format", "Expected .nii, found a header whose image is another file.")
    kind = nibabel.Nifti1Image if head[344:348] == b"n+1\0" else nibabel.Nifti2Image
    nifti = kind.from_stream(stream)
    _shape(nifti)
    _check_header(nifti)
    return nifti


def _inflated(content: bytes) -> bytes:
    """Returns a gzipped file as far as its header says, and a byte more where there is one.

    Asking for that byte is what makes gzip compare its checksum.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        end = _end(_opened(stream))
        stream.seek(0)
        return stream.read(end + 1)


def _shape(nifti: Any) -> tuple[int, int, int]:
    """Returns the shape as three axes."""
    shape = tuple(int(length) for length in nifti.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UnusableCase("four_dimensional", f"Expected one image, found a series of shape {shape}.")
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape.count(1) > 1:
        raise UnusableCase("unreadable", f"Expected rows and columns, found shape {shape}.")
    check_size(shape, most=MAX_PIXELS if 1 in shape else MAX_VOXELS)
    return shape[0], shape[1], shape[2]


def _check_header(nifti: Any) -> None:
    if nifti.get_data_dtype().kind not in "iuf":
        raise UnusableCase("unsupported_pixel_type", "Expected numbers, found another type.")
    if nifti.dataobj.offset > MAX_HEADER_BYTES:
        raise UnusableCase("unreadable", "Expected pixel data after the header, found a far offset.")


def _end(nifti: Any) -> int:
    """Returns the number of bytes of the file that its header describes."""
    offset: int = nifti.dataobj.offset  # nibabel clears the one in the header
    return offset + math.prod(_shape(nifti)) * int(nifti.get_data_dtype().itemsize)


def _check_length(nifti: Any, *, found: int) -> None:
    expected = _end(nifti)
    if found < expected:
        raise UnusableCase("truncated", f"Expected {expected} bytes, found {found}.")
    if found > expected:
        raise UnusableCase("excess_pixels", f"Expected {expected} bytes, found more.")


def _volume(values: np.ndarray, *, nifti: Any) -> Image:
    if not _has_orientation(nifti):
        raise UnusableCase("no_orientation", "Expected a volume with an orientation, found none.")
    affine = np.asarray(nifti.affine, np.float64).copy()
    lengths, stated = np.linalg.norm(affine[:3, :3], axis=0), np.abs(nifti.header.get_zooms()[:3])
    if not (np.abs(lengths - stated) <= SPACING_FRACTION * stated).all():
        raise UnusableCase("bad_spacing", "Expected one spacing in the header, found two that differ.")
    affine[:3] *= _unit_mm(nifti)
    return volume.turned(values, affine)


def _has_orientation(nifti: Any) -> bool:
    return bool(nifti.header["qform_code"] != 0 or nifti.header["sform_code"] != 0)


def _unit_mm(nifti: Any) -> float:
    unit = int(nifti.header["xyzt_units"]) & 7
    if unit not in MM_OF_UNIT:
        raise UnusableCase("bad_spacing", "Expected a unit of length, found an unknown one.")
    return MM_OF_UNIT[unit]


def _upright(values: np.ndarray, *, nifti: Any) -> Image:
    affine = nifti.affine if _has_orientation(nifti) else np.diag([-1.0, -1.0, 1.0, 1.0])
    stated = nibabel.orientations.io_orientation(affine)
    if not np.isfinite(stated).all():
        raise UnusableCase("unreadable", "Expected an orientation, found an affine of lower rank.")
    turn = nibabel.orientations.ornt_transform(stated, nibabel.orientations.axcodes2ornt("LPI"))
    turned = nibabel.orientations.apply_orientation(values, turn)
    axis = turned.shape.index(1)
    zooms = (*nifti.header.get_zooms()[:3], 1.0)  # a two-dimensional file has none for the third axis
    by_axis = [float(zooms[source]) * _unit_mm(nifti) for source in np.argsort(turn[:, 0])]
    del by_axis[axis]
    picture = np.ascontiguousarray(np.squeeze(turned, axis=axis).T)
    return Image(array=picture[None], spacing_mm=checked_spacing(by_axis[::-1]))
