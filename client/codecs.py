"""Decoders of compressed DICOM frames, as a plug-in of pydicom; loaded only in the decoder's own process.

One library for each way of compression, so that damage is not handed on to a laxer one: GDCM for JPEG,
CharLS for JPEG-LS, OpenJPEG for JPEG 2000 and its high-throughput form. What the compressed data says of
itself has to fit the header. None of these formats has a checksum: damage inside compressed data is found
where it breaks the coding, changes the length or leaves the range of the values, and not otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder

from client.raster import JPEG_MAGIC

NAME = "feverfew"
JPEG = ("JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLossless", "JPEGLosslessSV1")
JPEG_LS = ("JPEGLSLossless", "JPEGLSNearLossless")
JPEG_2000 = ("JPEG2000Lossless", "JPEG2000", "HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K")
UIDS = {name: getattr(pydicom.uid, name) for name in (*JPEG, *JPEG_LS, *JPEG_2000)}
DECODER_DEPENDENCIES = {uid: () for uid in UIDS.values()}  # pydicom asks for it
JPEG_2000_MAGIC = b"\xff\x4f\xff\x51"
END_OF_IMAGE = b"\xff\xd9"
END_BYTES = 16  # in which the end is looked for: fragments are filled up to an even length
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG's start of frame, and JPEG-LS's


def register() -> None:
    """Makes pydicom know these decoders."""
    for uid in UIDS.values():
        get_decoder(uid).add_plugin(NAME, (__name__, "decoded"))


def is_available(uid: str) -> bool:
    """Tells pydicom that the libraries are there, since they are installed with us."""
    return uid in DECODER_DEPENDENCIES


def decoded(source: bytes, runner: Any) -> bytes | bytearray:
    """Returns the values of one compressed frame, little-endian.

    Raises:
        ValueError: the data does not fit its header, or decodes to values that it cannot have.
    """
    _check_stated(source, runner)
    syntax = runner.transfer_syntax
    frame: bytes | bytearray
    if syntax in [UIDS[name] for name in JPEG]:
        frame = _gdcm(source, runner)
    elif syntax in [UIDS[name] for name in JPEG_LS]:
        frame = _charls(source, runner)
    else:
        frame = _openjpeg(source, runner)
    _check_range(frame, runner)
    return frame


def heard_of(jpeg: bytes, *, size: tuple[int, int], num_channels: int) -> None:
    """Decodes a JPEG picture for the sake of the decoder's complaints, which it writes to stderr."""
    photometric = "MONOCHROME2" if num_channels == 1 else "YBR_FULL_422"
    _buffer(jpeg, size, num_channels, photometric, UIDS[JPEG[0]], bits=(8, 8), signed=0)


def _gdcm(source: bytes, runner: Any) -> bytes:
    bits = runner.bits_allocated, runner.bits_stored
    photometric, samples = runner.photometric_interpretation, runner.samples_per_pixel
    size = (runner.columns, runner.rows)
    signed = runner.pixel_representation
    return _buffer(source, size, samples, photometric, runner.transfer_syntax, bits=bits, signed=signed)


def _buffer(
    source: bytes,
    size: tuple[int, int],
    samples: int,
    photometric: str,
    syntax: str,
    *,
    bits: tuple[int, int],
    signed: int,
) -> bytes:
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((*size, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation
    image.SetPhotometricInterpretation(kind(kind.GetPIType(photometric)))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str.__str__(syntax))))
    image.SetPixelFormat(gdcm.PixelFormat(samples, bits[0], bits[1], bits[1] - 1, signed))
    # GDCM hands bytes out as text
    frame: bytes = image.GetBuffer().encode("utf-8", "surrogateescape")
    return frame


def _charls(source: bytes, runner: Any) -> bytearray:
    import jpeg_ls  # type: ignore[import-untyped]

    frame: bytearray
    frame, information = jpeg_ls.decode_pixel_data(source)
    runner.set_option("planar_configuration", int(information["interleave_mode"] == 0))
    runner.set_option("bits_allocated", _container(information["bits_per_sample"]))
    return frame


def _openjpeg(source: bytes, runner: Any) -> bytearray:
    from openjpeg.utils import decode_pixel_data

    frame = bytearray(decode_pixel_data(source, version=2))
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")  # OpenJPEG has converted it
    runner.set_option("bits_allocated", _container(runner.get_option("j2k_precision", runner.bits_stored)))
    return frame


def _container(bits: int) -> int:
    return 8 if bits <= 8 else 16 if bits <= 16 else 32


def _check_stated(source: bytes, runner: Any) -> None:
    stated = _stated_jpeg_2000(source) if JPEG_2000_MAGIC in source[:4096] else _stated_jpeg(source)
    expected = (runner.rows, runner.columns, runner.samples_per_pixel)
    if stated != expected:
        raise ValueError("the compressed data is of another size than the header says")
    if END_OF_IMAGE not in source[-END_BYTES:]:
        raise ValueError("the compressed data is truncated")


def _stated_jpeg(source: bytes) -> tuple[int, int, int]:
    """Returns rows, columns and components that JPEG or JPEG-LS data states."""
    for marker, segment in _segments(source):
        if marker in FRAME_MARKERS:
            height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            return height, width, segment[5]
    raise ValueError("the compressed data states no size")


def _segments(source: bytes) -> Iterator[tuple[int, bytes]]:
    position = 2 if source[:2] == JPEG_MAGIC[:2] else len(source)
    while position + 4 <= len(source) and source[position] == 0xFF:
        if source[position + 1] == 0xFF:  # filling
            position += 1
            continue
        length = int.from_bytes(source[position + 2 : position + 4], "big")
        yield source[position + 1], source[position + 4 : position + 2 + length]
        position += 2 + length


def _stated_jpeg_2000(source: bytes) -> tuple[int, int, int]:
    start = source.index(JPEG_2000_MAGIC) + 8  # after SOC, SIZ, its length and capabilities
    right, bottom, left, top = np.frombuffer(source, ">u4", 4, start).tolist()
    return bottom - top, right - left, int.from_bytes(source[start + 32 : start + 34], "big")


def _check_range(frame: bytes | bytearray, runner: Any) -> None:
    """Refuses grey values of more bits than the header says are stored, as damage makes them."""
    bits, container = runner.bits_stored, runner.get_option("bits_allocated", runner.bits_allocated)
    if runner.samples_per_pixel != 1 or bits >= container or container > 16:
        return
    values = np.frombuffer(frame, f"<u{container // 8}")
    beyond = values >= 2**bits
    if runner.pixel_representation == 1:
        beyond &= values < 2**container - 2 ** (bits - 1)
    if beyond.any():
        raise ValueError("the compressed data holds values of more bits than the header says")
