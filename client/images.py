"""Reads DICOM, NIfTI, PNG and JPEG into one kind of array; nothing else in the product reads image files.

A file is judged by its content, never by its name. What cannot be read with certainty is refused with a
code (``UnusableCase``); no other exception of a decoder escapes. Of a header only the tags that are
needed for the pixels are parsed, and only the spacing is kept.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from PIL import Image as Pillow
from PIL import ImageOps
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder, pixel_array

from client import decoder, files
from common.errors import UnusableCase

MAX_PIXELS = 2**26  # the largest radiographs (mammography, 16-bit) have about 2**25
MAX_HEADER_BYTES = 2**24  # NIfTI header extensions

DEFLATED = b"1.2.840.10008.1.2.1.99"
PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
FRAME_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
NEEDED_KEYWORDS = [
    *("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
    *("PixelSpacing", "ImagerPixelSpacing", "PixelPaddingValue", "PixelPaddingRangeLimit"),
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
]
LOGGERS = ("pydicom", "nibabel.global", "PIL")  # they quote header values


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image of a case.

    Attributes:
        array: float32, (channels, *spatial); 1 channel or 3 (red, green, blue). In two dimensions the
            spatial axes are rows downwards and columns to the right, as the picture is looked at; in
            grey images bright is dense. Units are those of the file after rescale and window.
        spacing_mm: distance of pixel centres along each spatial axis, None where the file has none.
    """

    array: np.ndarray
    spacing_mm: tuple[float, ...] | None


def read(path: Path) -> Image:
    """Reads one image file.

    Raises:
        UnusableCase: the file is missing, broken, or of a kind that is not read with certainty.
    """
    return decode(files.load(path))


def decode(content: bytes) -> Image:
    """Decodes the content of one image file.

    ``MemoryError`` is passed on: the size is bounded before decoding, so the machine is to blame, and a
    case must not be refused because of what else runs on it.

    Raises:
        UnusableCase: see the codes in ``client/quarantine.py``.
    """
    try:
        with _silent():
            image = _reader(content)(content)
    except (UnusableCase, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise UnusableCase(code_of(error), f"{type(error).__name__}: {error}") from None
    return _judged(image)


def code_of(error: Exception) -> str:
    """Tells from a decoder's error whether the file is cut off, of a kind without decoder, or damaged."""
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncat" in text:
        return "truncated"
    if isinstance(error, Pillow.DecompressionBombError):
        return "too_large"
    return "unsupported_transfer_syntax" if "does not support" in text else "unreadable"


def _reader(content: bytes) -> Any:
    if content[128:132] == b"DICM":
        return read_dicom
    if content[:8] == b"\x89PNG\r\n\x1a\n" or content[:3] == b"\xff\xd8\xff":
        return read_raster
    if content[:2] == b"\x1f\x8b" or _is_nifti(content):
        return read_nifti
    if not content:
        raise UnusableCase("empty_file", "Expected an image, found an empty file.")
    raise UnusableCase("unknown_format", "Expected DICOM, NIfTI, PNG or JPEG by content, found another.")


def _is_nifti(content: bytes) -> bool:
    return content[344:348] in (b"n+1\0", b"ni1\0") or content[4:8] in (b"n+2\0", b"ni2\0")


def _judged(image: Image) -> Image:
    array = image.array
    if not np.isfinite(array).all():
        raise UnusableCase("non_finite", "Expected finite pixel values, found NaN or infinity.")
    if array.size == 0 or array.min() == array.max():
        raise UnusableCase("constant", "Expected an image, found one value everywhere.")
    return image


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps warnings and log lines of the decoders, which quote header values, from getting out."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_size(*, shape: tuple[int, ...]) -> None:
    if any(length < 1 for length in shape):
        raise UnusableCase("unreadable", f"Expected a positive size, found {shape}.")
    if math.prod(shape) > MAX_PIXELS:
        raise UnusableCase("too_large", f"Expected at most {MAX_PIXELS} pixels, found {shape}.")


def _checked_spacing(values: Any) -> tuple[float, ...] | None:
    if values is None or values == "" or len(values) == 0:
        return None
    spacing = tuple(float(value) for value in values)
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise UnusableCase("bad_spacing", f"Expected spacing_mm > 0, found {spacing}.")
    return spacing


# DICOM


def read_dicom(content: bytes) -> Image:
    """Decodes one DICOM file of one frame.

    Grey: unused bits are masked, the modality LUT or rescale is applied, then the first VOI LUT, or else
    the first window, whose output spans the range of the stored values as the standard has it;
    MONOCHROME1 is inverted within that range, so that bright is dense; padding takes the darkest value.
    Colour (RGB, YBR, palette) becomes RGB as stored, without window.
    """
    dataset = parsed(content)
    _check_header(dataset)
    isolated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    stored = decoder.stored_pixels(content) if isolated else stored_pixels(dataset)
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    array = _grey(stored, dataset=dataset)[None] if photometric in GREY else _colour_first(stored)
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    return Image(array=array, spacing_mm=_checked_spacing(spacing))


def stored_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """Returns the stored values of a DICOM file of one frame, decompressed, colour as RGB.

    Shape (rows, columns) or (rows, columns, 3), integers in native byte order, unused bits masked.
    """
    stored: np.ndarray = pixel_array(dataset, index=0)
    return stored.astype(stored.dtype.newbyteorder("="))


def parsed(content: bytes) -> pydicom.Dataset:
    """Parses the tags that are needed, with the functional groups of an only frame laid flat."""
    _check_inflated_size(content)
    source = io.BytesIO(content)
    dataset = pydicom.dcmread(source, specific_tags=list(NEEDED_KEYWORDS))
    if not any(dataset.get(keyword) is not None for keyword in PIXEL_KEYWORDS):
        # The parser seeks over what it does not need, and drops an element whose end is missing.
        if source.tell() > len(content) or PIXEL_DATA_TAG in content:
            raise UnusableCase("truncated", "Expected pixel data, found the end of the file.")
        raise UnusableCase("no_pixel_data", "Expected pixel data, found a header without an image.")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UnusableCase("multi_frame", f"Expected one frame, found {dataset.NumberOfFrames}.")
    for keyword in FRAME_GROUPS:
        for group in list(dataset.get(keyword) or [])[:1]:
            for element in (e for macro in group if macro.VR == "SQ" and macro.value for e in macro.value[0]):
                if element.keyword in NEEDED_KEYWORDS and element.tag not in dataset:
                    dataset.add(element)
    return dataset


def _check_inflated_size(content: bytes) -> None:
    meta_end = 144 + int.from_bytes(content[140:144], "little")
    if DEFLATED not in content[132:meta_end]:
        return
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[meta_end:], 8 * MAX_PIXELS)
    if len(inflated) == 8 * MAX_PIXELS:
        raise UnusableCase("too_large", "Expected a file of bearable size once inflated.")


def _check_header(dataset: pydicom.Dataset) -> None:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        get_decoder(syntax or "")
    except NotImplementedError:
        raise UnusableCase("unsupported_transfer_syntax", f"Expected a known one, found {syntax}.") from None
    missing = [keyword for keyword in NEEDED_KEYWORDS[:5] if keyword not in dataset]
    if set(missing) - {"NumberOfFrames"}:
        raise UnusableCase("incomplete_header", f"Expected {missing[0]}, found none.")
    _check_size(shape=(dataset.Rows, dataset.Columns, dataset.SamplesPerPixel))
    photometric, polarity = dataset.PhotometricInterpretation, dataset.get("PresentationLUTShape")
    if photometric not in (*GREY, *COLOURS, "PALETTE COLOR"):
        raise UnusableCase("unsupported_photometric", f"Expected grey or colour, found {photometric}.")
    if dataset.SamplesPerPixel != (3 if photometric in COLOURS else 1):
        raise UnusableCase("incomplete_header", f"Expected SamplesPerPixel to fit {photometric}.")
    if photometric == "MONOCHROME2" and polarity == "INVERSE":
        raise UnusableCase("unclear_polarity", "Expected MONOCHROME2 with IDENTITY, found INVERSE.")
    if "PixelData" not in dataset:
        raise UnusableCase("unsupported_pixel_type", "Expected integer pixels, found floating point.")
    if "HighBit" in dataset and dataset.HighBit != dataset.BitsStored - 1:
        raise UnusableCase("unsupported_pixel_type", "Expected HighBit = BitsStored - 1.")
    if not syntax.is_encapsulated:
        _check_length(dataset)


def _check_length(dataset: pydicom.Dataset) -> None:
    samples = dataset.SamplesPerPixel
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        samples = 2
    expected = -(-dataset.Rows * dataset.Columns * samples * dataset.BitsAllocated // 8)
    if len(dataset.PixelData) < expected:
        raise UnusableCase("truncated", f"Expected {expected} bytes, found {len(dataset.PixelData)}.")


def _grey(stored: np.ndarray, *, dataset: pydicom.Dataset) -> np.ndarray:
    values, low, high = _modality(stored, dataset=dataset)
    values, low, high = _voi(values, low, high, dataset=dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = (low + high) - values
    padded = _padding(stored, dataset=dataset)
    if padded.any() and not padded.all():
        values[padded] = values[~padded].min()
    return values.astype(np.float32)


def _modality(stored: np.ndarray, *, dataset: pydicom.Dataset) -> tuple[np.ndarray, float, float]:
    """Returns the modality's values and the range that they can take."""
    kind: type[Any] = np.float32 if stored.dtype.itemsize <= 2 else np.float64
    if dataset.get("ModalityLUTSequence"):
        bits = dataset.ModalityLUTSequence[0].LUTDescriptor[2]
        return apply_modality_lut(stored, dataset).astype(kind), 0.0, 2.0**bits - 1
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if (slope is None) != (intercept is None) or slope == 0:
        raise UnusableCase("bad_rescale", f"Expected slope and intercept, found {slope} and {intercept}.")
    if slope is None or intercept is None:
        slope, intercept = 1.0, 0.0
    signed, bits = dataset.PixelRepresentation == 1, dataset.BitsStored
    ends = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    low, high = sorted(end * slope + intercept for end in ends)
    return stored.astype(kind) * kind(slope) + kind(intercept), low, high


def _voi(
    values: np.ndarray, low: float, high: float, *, dataset: pydicom.Dataset
) -> tuple[np.ndarray, float, float]:
    """Applies the first VOI LUT, else the first window; returns the new values and their range."""
    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        mapped = apply_voi(np.rint(values).astype(np.int64), dataset, 0)
        return mapped.astype(values.dtype), 0.0, 2.0**bits - 1
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if centre is None and width is None:
        return values, low, high
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    fraction = _windowed(values, centre=centre, width=width, function=function)
    return fraction * values.dtype.type(high - low) + values.dtype.type(low), low, high


def _windowed(values: np.ndarray, *, centre: float | None, width: float | None, function: str) -> np.ndarray:
    """Returns values in [0, 1] by PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    least = 1 if function == "LINEAR" else 0
    if centre is None or width is None or width < least or width <= 0:
        raise UnusableCase("bad_window", f"Expected a window, found centre {centre}, width {width}.")
    kind: type[Any] = values.dtype.type
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
        if width == 0:
            return (values > centre).astype(kind)
    if function in ("LINEAR", "LINEAR_EXACT"):
        return np.asarray(np.clip((values - kind(centre)) / kind(width) + kind(0.5), 0, 1))
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(kind(-4) * (values - kind(centre)) / kind(width))))
    raise UnusableCase("bad_window", f"Expected LINEAR, LINEAR_EXACT or SIGMOID, found {function}.")


def _padding(stored: np.ndarray, *, dataset: pydicom.Dataset) -> np.ndarray:
    first, limit = _number(dataset, "PixelPaddingValue"), _number(dataset, "PixelPaddingRangeLimit")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = first if limit is None else limit
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """Returns the first value of a numeric tag; None where it is absent or empty."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number):
        raise UnusableCase("incomplete_header", f"Expected a finite {keyword}, found {number}.")
    return number


def _colour_first(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(rows[..., :3], -1, 0), dtype=np.float32)


# NIfTI


def read_nifti(content: bytes) -> Image:
    """Decodes one NIfTI file with one slice.

    The axes are turned to those of a DICOM image in the standard planes: rows run to posterior (axial)
    or inferior (coronal, sagittal), columns to the patient's left, or posterior in sagittal slices; the
    nearest such plane counts. A file that states no orientation (both codes 0) is taken as column and
    row indices of the picture, as stored.
    """
    stream = _inflated(content)
    head = stream.read(540)
    stream.seek(0)
    if not _is_nifti(head):
        raise UnusableCase("unknown_format", "Expected NIfTI in a gzip file, found another format.")
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise UnusableCase("unknown_format", "Expected .nii, found a header whose image is another file.")
    kind = nibabel.Nifti1Image if _is_nifti1(head) else nibabel.Nifti2Image
    nifti = kind.from_stream(stream)
    shape = _one_slice(nifti)
    stream.seek(nifti.dataobj.offset)  # nibabel clears the offset in the header
    num_bytes = math.prod(shape) * nifti.get_data_dtype().itemsize
    if len(stream.read(num_bytes)) < num_bytes:
        raise UnusableCase("truncated", f"Expected {num_bytes} bytes of pixels, found less.")
    values = np.asanyarray(nifti.dataobj).reshape(shape).astype(np.float32)
    return _upright(values, nifti=nifti)


def _upright(values: np.ndarray, *, nifti: Any) -> Image:
    affine = nifti.affine
    if nifti.header["qform_code"] == 0 and nifti.header["sform_code"] == 0:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the left, rows to posterior
    stated = nibabel.orientations.io_orientation(affine)
    if not np.isfinite(stated).all():
        raise UnusableCase("unreadable", "Expected an orientation, found an affine of lower rank.")
    turn = nibabel.orientations.ornt_transform(stated, nibabel.orientations.axcodes2ornt("LPI"))
    turned = nibabel.orientations.apply_orientation(values, turn)
    axis = turned.shape.index(1)
    zooms = (*nifti.header.get_zooms()[:3], 1.0)  # a two-dimensional file has none for the third axis
    by_axis = [float(zooms[source]) for source in np.argsort(turn[:, 0])]
    del by_axis[axis]
    picture = np.ascontiguousarray(np.squeeze(turned, axis=axis).T)
    return Image(array=picture[None], spacing_mm=_checked_spacing(by_axis[::-1]))


def _is_nifti1(head: bytes) -> bool:
    return head[344:348] == b"n+1\0"


def _inflated(content: bytes) -> Any:
    plain = io.BytesIO(content)
    return gzip.GzipFile(fileobj=plain) if content[:2] == b"\x1f\x8b" else plain


def _one_slice(nifti: Any) -> tuple[int, int, int]:
    """Returns the shape as three axes, exactly one of which has length 1."""
    shape = tuple(int(length) for length in nifti.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UnusableCase("four_dimensional", f"Expected one image, found a series of shape {shape}.")
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape.count(1) > 1:
        raise UnusableCase("unreadable", f"Expected rows and columns, found shape {shape}.")
    _check_size(shape=shape)
    if 1 not in shape:
        raise UnusableCase("three_dimensional", f"Expected one slice, found a volume of shape {shape}.")
    if nifti.get_data_dtype().kind not in "iuf":
        raise UnusableCase("unsupported_pixel_type", f"Expected numbers, found {nifti.get_data_dtype()}.")
    if nifti.dataobj.offset > MAX_HEADER_BYTES:
        raise UnusableCase("unreadable", "Expected pixel data after the header, found a far offset.")
    return shape[0], shape[1], shape[2]


# PNG and JPEG


def read_raster(content: bytes) -> Image:
    """Decodes PNG or JPEG: 1, 8 or 16 bit grey, palette, RGB (16-bit RGB with 8 bits a channel).

    An alpha channel is dropped where it is opaque everywhere and refused otherwise, since what lies
    behind is unknown. EXIF orientation is applied.
    """
    picture: Any = Pillow.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    if getattr(picture, "n_frames", 1) != 1:
        raise UnusableCase("multi_frame", f"Expected one frame, found {picture.n_frames}.")
    _check_size(shape=(picture.height, picture.width))
    picture.load()
    picture = _opaque(ImageOps.exif_transpose(picture))
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode == "RGB":
        return Image(array=_colour_first(np.asarray(picture)), spacing_mm=None)
    if picture.mode == "L" or picture.mode.startswith("I"):
        return Image(array=np.asarray(picture).astype(np.float32)[None], spacing_mm=None)
    raise UnusableCase("unsupported_pixel_type", f"Expected grey or RGB, found {picture.mode}.")


def _opaque(picture: Any) -> Any:
    """Returns the picture without alpha.

    Raises:
        UnusableCase: some pixel is transparent.
    """
    if "transparency" in picture.info and picture.mode not in ("LA", "RGBA", "PA"):
        if picture.mode.startswith("I"):
            raise UnusableCase("transparent", "Expected opaque pixels, found a transparent grey value.")
        picture = picture.convert("RGBA")
    if picture.mode not in ("LA", "RGBA", "PA"):
        return picture
    if picture.getchannel("A").getextrema() != (255, 255):
        raise UnusableCase("transparent", "Expected opaque pixels, found transparent ones.")
    return picture.convert("L" if picture.mode == "LA" else "RGB")
