"""Image files that tests make: DICOM, NIfTI, PNG and others, from arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from client import images
from common.errors import UnusableCase

VENDORS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dicom_multivendor"
TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 300  # 12 bits, not square, no symmetry


def dicom(stored: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """Returns a DICOM file with these stored values, 12 of 16 bits, MONOCHROME2 unless said otherwise."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.PatientName = "Planted^Name"
    bits = stored.dtype.itemsize * 8
    described = {
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": min(bits, 12),
        "HighBit": min(bits, 12) - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes(),
    }
    for keyword, value in {**described, **tags}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset["PixelData"].is_undefined_length = syntax == MPEG2MPML
    if syntax in (RLELossless, JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def nifti(array: np.ndarray, *, affine: np.ndarray | None = None) -> bytes:
    content: bytes = nibabel.Nifti1Image(
        array, np.diag([-1.0, -1, 1, 1]) if affine is None else affine
    ).to_bytes()
    return content


def raster(array: np.ndarray, *, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(array).save(stream, format=kind, **options)
    return stream.getvalue()


def code(content: bytes) -> str:
    with pytest.raises(UnusableCase) as caught:
        images.decode(content)
    return caught.value.code


def outcome(path: Path) -> str:
    """Returns what became of a file: read, or the code of the refusal."""
    try:
        images.read(path)
    except UnusableCase as error:
        return error.code
    return "read"


def turn(*degrees: float) -> np.ndarray:
    """Returns a rotation about the axes one after the other, (3, 3)."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        others = [one for one in range(3) if one != axis]
        about = np.eye(3)
        about[np.ix_(others, others)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        rotation = about @ rotation
    return rotation


def grid(
    *, axes: np.ndarray, spacing_mm: Sequence[float], origin_mm: Sequence[float] = (-31.5, 17.25, 8.0)
) -> np.ndarray:
    """Returns the affine of a volume: axes in columns, towards right, anterior and superior."""
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


def places(affine: np.ndarray, *, num_slices: int) -> list[dict[str, Any]]:
    """Returns the tags that place the slices of a volume; its axes are column, row and slice."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    directions = [*(lps[:3, 0] / lengths[0]), *(lps[:3, 1] / lengths[1])]
    return [
        {
            "ImagePositionPatient": [f"{one:.10g}" for one in lps[:3, 3] + index * lps[:3, 2]],
            "ImageOrientationPatient": [f"{one:.10g}" for one in directions],
            "PixelSpacing": [f"{lengths[1]:.10g}", f"{lengths[0]:.10g}"],
            "SeriesInstanceUID": "1.2.3.4",
        }
        for index in range(num_slices)
    ]


def series(voxels: np.ndarray, *, affine: np.ndarray, **tags: Any) -> list[bytes]:
    """Returns the files of a series, one for each slice; voxels are (columns, rows, slices)."""
    placed = places(affine, num_slices=voxels.shape[2])
    return [
        dicom(np.ascontiguousarray(voxels[:, :, k].T), **{**place, **tags}) for k, place in enumerate(placed)
    ]


def enhanced(
    voxels: np.ndarray, *, affine: np.ndarray, each: Sequence[dict[str, Any]] = (), **tags: Any
) -> bytes:
    """Returns one file with all slices as frames; ``each`` changes what is said of single frames."""
    groups = []
    placed = places(affine, num_slices=voxels.shape[2])
    for place in [{**one, **other} for one, other in zip(placed, each or [{}] * len(placed), strict=True)]:
        group = Dataset()
        for sequence, keyword in (
            ("PlanePositionSequence", "ImagePositionPatient"),
            ("PlaneOrientationSequence", "ImageOrientationPatient"),
            ("PixelMeasuresSequence", "PixelSpacing"),
        ):
            macro = Dataset()
            if place[keyword] is not None:
                setattr(macro, keyword, place[keyword])
            setattr(group, sequence, [macro])
        if "RescaleSlope" in place:
            macro = Dataset()
            macro.RescaleSlope, macro.RescaleIntercept = place["RescaleSlope"], place["RescaleIntercept"]
            group.PixelValueTransformationSequence = [macro]
        groups.append(group)
    frames = np.ascontiguousarray(voxels.transpose(2, 1, 0))
    stated = {"NumberOfFrames": len(frames), "PixelData": frames.tobytes(), **tags}
    return dicom(frames[0], PerFrameFunctionalGroupsSequence=groups, **stated)
