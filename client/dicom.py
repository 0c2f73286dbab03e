"""DICOM files: the header as far as the pixels need it, and the stored values of the frames."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import Tag
from pydicom.uid import RLELossless

from client import decoder
from client.image import MAX_PIXELS, MAX_VOXELS, check_size
from common.errors import UnusableCase

DEFLATED = b"1.2.840.10008.1.2.1.99"
PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"
PIXEL_GROUP = 0x7FE0
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
FRAME_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
REQUIRED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
SIEMENS_CREATOR = (0x0019, 0x0010)
SIEMENS_NUM_MOSAIC = (0x0019, 0x100A)  # in the block of "SIEMENS MR HEADER"
NEEDED: tuple[str | tuple[int, int], ...] = (
    *(*REQUIRED, "NumberOfFrames", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
    *(*PLACE, "ImagerPixelSpacing", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("SeriesInstanceUID", "SOPClassUID", "ImageType", SIEMENS_CREATOR, SIEMENS_NUM_MOSAIC),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "PresentationLUTShape"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    "SegmentedBluePaletteColorLookupTableData",
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *FRAME_GROUPS,
    *PIXEL_KEYWORDS,
)
NEEDED_TAGS = [Tag(one) for one in NEEDED]  # worked out once, not for every file
KEPT = (  # of the tags outside the groups, those that hold for every frame
    *("PixelRepresentation", "PixelSpacing", "ImageOrientationPatient"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
)


def is_dicom(content: bytes) -> bool:
    """Tells a DICOM file (part 10) by its magic."""
    return content[128:132] == b"DICM"


def code_of(error: Exception) -> str:
    """Tells from a decoder's error whether the file is cut off, of a kind without decoder, or damaged."""
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncat" in text:
        return "truncated"
    if type(error).__name__ == "DecompressionBombError":  # Pillow's, for any picture
        return "too_large"
    return "unsupported_transfer_syntax" if "does not support" in text else "unreadable"


def opened(content: bytes) -> pydicom.Dataset:
    """Parses a file, and refuses what its header says that is not read with certainty.

    Raises:
        UnusableCase: see the codes in ``client/quarantine.py``.
    """
    dataset = parsed(content)
    _check_kind(dataset)
    _check_pixels(dataset)
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        _check_length(dataset)
    return dataset


def parsed(content: bytes) -> pydicom.Dataset:
    """Parses the tags that are needed, with the functional groups of an only frame laid flat."""
    inflated = _inflated(content)
    source = io.BytesIO(content)
    dataset = pydicom.dcmread(source, specific_tags=NEEDED_TAGS)
    if not any(dataset.get(keyword) is not None for keyword in PIXEL_KEYWORDS):
        # The parser seeks over what it does not need, and drops an element whose end is missing.
        if source.tell() > len(content) or PIXEL_DATA_TAG in content:
            raise UnusableCase("truncated", "Expected pixel data, found the end of the file.")
        raise UnusableCase("no_pixel_data", "Expected pixel data, found a header without an image.")
    if inflated:
        _check_rest(dataset, inflated)
    if num_frames(dataset) == 1:
        for keyword in FRAME_GROUPS:
            for group in list(dataset.get(keyword) or [])[:1]:
                _lay(group, on=dataset)
    return dataset


def num_frames(dataset: pydicom.Dataset) -> int:
    """Returns the number of frames that a header states; 1 where it states none."""
    return int(dataset.get("NumberOfFrames") or 1)


def frames(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Returns for each frame of a file with several the tags that hold for it, its place among them.

    Raises:
        UnusableCase: ``multi_frame``: frames without a position, such as those of a film.
    """
    per_frame = list(dataset.get(FRAME_GROUPS[0]) or [])
    if len(per_frame) != num_frames(dataset):
        raise UnusableCase("multi_frame", f"Expected one frame, found {num_frames(dataset)}.")
    general = pydicom.Dataset()
    general.update({element.tag: element for element in dataset if element.keyword in REQUIRED + KEPT})
    for group in list(dataset.get(FRAME_GROUPS[1]) or [])[:1]:
        _lay(group, on=general, replace=True)
    headers = []
    for group in per_frame:
        header = pydicom.Dataset()
        header.update(general)
        _lay(group, on=header, replace=True)
        headers.append(header)
    if any("ImagePositionPatient" not in header for header in headers):
        raise UnusableCase("multi_frame", f"Expected a place for each of {len(headers)} frames, found none.")
    return headers


def _lay(group: pydicom.Dataset, *, on: pydicom.Dataset, replace: bool = False) -> None:
    """Lays the needed tags of a functional group flat on a header."""
    for macro in group:
        # A private sequence may hold the same tags with other values, as Philips's does.
        if macro.VR == "SQ" and macro.value and not macro.tag.is_private:
            for element in macro.value[0]:
                if element.keyword in NEEDED and (replace or element.tag not in on):
                    on.add(element)


def pixels(dataset: pydicom.Dataset, *, content: bytes) -> np.ndarray:
    """Returns the stored values of a parsed file; compressed ones are decoded in a process of their own.

    Shape as ``stored_pixels``.
    """
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return decoder.stored_pixels(content)
    return stored_pixels(dataset)


def stored_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """Returns the stored values of a DICOM file, decompressed, colour as RGB.

    Shape (rows, columns) or (rows, columns, 3), with the frames in front where there are several; integers
    in native byte order, unused bits masked.
    """
    index = 0 if num_frames(dataset) == 1 else None
    syntax = dataset.file_meta.TransferSyntaxUID
    ours = syntax.is_encapsulated and syntax != RLELossless
    stored: np.ndarray = pixel_array(dataset, index=index, decoding_plugin="feverfew" if ours else "")
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _inflated(content: bytes) -> bytes:
    """Returns what a deflated file holds, within bounds, its end verified; nothing for other files."""
    meta_end = 144 + int.from_bytes(content[140:144], "little")
    if DEFLATED not in content[132:meta_end]:
        return b""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = stream.decompress(content[meta_end:], 8 * MAX_PIXELS)
    if len(inflated) == 8 * MAX_PIXELS:
        raise UnusableCase("too_large", "Expected a file of bearable size once inflated.")
    if not stream.eof:
        raise UnusableCase("truncated", "Expected the end of the deflated data, found the end of the file.")
    if stream.unused_data.strip(b"\0") and not _is_gzip_end(stream.unused_data, inflated):
        raise UnusableCase("unreadable", "Expected nothing after the deflated data, found bytes.")
    return inflated


def _is_gzip_end(rest: bytes, inflated: bytes) -> bool:
    """Tells the checksum and length that some programs write after the deflated data, as gzip has them."""
    return rest[:8] == zlib.crc32(inflated).to_bytes(4, "little") + len(inflated).to_bytes(4, "little")


def _check_rest(dataset: pydicom.Dataset, inflated: bytes) -> None:
    """Refuses a deflated file whose pixels are followed by no element: its length was changed by damage."""
    element = next(dataset[keyword] for keyword in PIXEL_KEYWORDS if keyword in dataset)
    rest = inflated[element.file_tell + len(element.value) :]
    if rest and int.from_bytes(rest[:2], "little") < PIXEL_GROUP:
        raise UnusableCase("unreadable", "Expected an element after the pixels, found other bytes.")


def _check_kind(dataset: pydicom.Dataset) -> None:
    try:
        get_decoder(dataset.file_meta.get("TransferSyntaxUID") or "")
    except NotImplementedError:
        raise UnusableCase("unsupported_transfer_syntax", "Expected a known one, found another.") from None
    creator = str(dataset.get(SIEMENS_CREATOR, pydicom.DataElement(0x00190010, "LO", "")).value)
    is_mosaic = creator.startswith("SIEMENS MR") and SIEMENS_NUM_MOSAIC in dataset
    if is_mosaic or "MOSAIC" in _texts(dataset.get("ImageType")):
        raise UnusableCase("mosaic", "Expected one slice, found a mosaic of several.")


def _texts(value: Any) -> Iterable[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _check_pixels(dataset: pydicom.Dataset) -> None:
    missing = [keyword for keyword in REQUIRED if dataset.get(keyword) is None]
    if missing:
        raise UnusableCase("incomplete_header", f"Expected {missing[0]}, found none.")
    size, several = (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel), num_frames(dataset) != 1
    check_size((num_frames(dataset), *size) if several else size, most=MAX_VOXELS if several else None)
    photometric, polarity = dataset.PhotometricInterpretation, dataset.get("PresentationLUTShape")
    if photometric not in (*GREY, *COLOURS, "PALETTE COLOR"):
        raise UnusableCase("unsupported_photometric", "Expected grey or colour, found something else.")
    if dataset.SamplesPerPixel != (3 if photometric in COLOURS else 1):
        raise UnusableCase("incomplete_header", f"Expected SamplesPerPixel to fit {photometric}.")
    if photometric == "MONOCHROME2" and polarity == "INVERSE":
        raise UnusableCase("unclear_polarity", "Expected MONOCHROME2 with IDENTITY, found INVERSE.")
    if "PixelData" not in dataset:
        raise UnusableCase("unsupported_pixel_type", "Expected integer pixels, found floating point.")
    if "HighBit" in dataset and dataset.HighBit != dataset.BitsStored - 1:
        raise UnusableCase("unsupported_pixel_type", "Expected HighBit = BitsStored - 1.")


def _check_length(dataset: pydicom.Dataset) -> None:
    """Refuses pixels that do not fill the stated size exactly: one of the two is wrong.

    An odd length has one byte of padding, whatever its value; zeros up to one row are padding too.
    """
    samples = 2 if dataset.PhotometricInterpretation == "YBR_FULL_422" else dataset.SamplesPerPixel
    row = -(-dataset.Columns * samples * dataset.BitsAllocated // 8)
    pixels_in_all = num_frames(dataset) * dataset.Rows * dataset.Columns
    expected = -(-pixels_in_all * samples * dataset.BitsAllocated // 8)
    found = len(dataset.PixelData)
    if found < expected:
        raise UnusableCase("truncated", f"Expected {expected} bytes of pixels, found {found}.")
    extra = dataset.PixelData[expected + expected % 2 :]
    if len(extra) > row or any(extra):
        raise UnusableCase("excess_pixels", f"Expected {expected} bytes of pixels, found {found}.")
