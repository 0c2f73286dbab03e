"""Fuzzes DICOM files: the header as the decoder of images reads it, as ``check`` and as ``fetch`` do.

Compressed pixels are decoded in a child process, which has tests of its own (``test_client_damage.py``).
"""

from __future__ import annotations

from typing import Any

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from client import decoder, images, part10
from client.declared import declared
from common.errors import UnusableCase
from tests.fuzz import PLACE
from tests.scans import RAMP, dicom

SEEDS = [
    dicom(RAMP),
    dicom(RAMP, syntax=ImplicitVRLittleEndian, WindowCenter=1000, WindowWidth=500, RescaleSlope=2),
    dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian),
    dicom(RAMP, syntax=RLELossless),
    dicom(RAMP, NumberOfFrames=1, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"),
]
FILE = PLACE / "case.dcm"


def _not_decoded(content: bytes) -> Any:
    raise UnusableCase("unreadable")


def parse(data: bytes) -> None:
    """Reads bytes as a DICOM file, in the three ways in which a hospital's files are read."""
    decoder.stored_pixels = _not_decoded
    FILE.write_bytes(data)
    part10.instance_of(data[: part10.HEAD_BYTES])
    declared(FILE)
    try:
        images.decode(data)
    except UnusableCase:
        return
