"""Reads DICOM, NIfTI, PNG, JPEG and TIFF into one kind of array; nothing else in the product reads images.

A file is judged by its content, never by its name. What cannot be read with certainty is refused with a
code (``UnusableCase``); no other exception of a decoder escapes. Of a header only the tags that are
needed for the pixels are parsed, and only spacing and orientation are kept.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from client import dicom, files, nifti, raster, series
from client.image import Image as Image
from common.errors import UnusableCase

LOGGERS = ("pydicom", "nibabel.global", "PIL")  # they quote header values


def read(path: Path) -> Image:
    """Reads an image file, or a folder with the files of one DICOM series; hidden files are passed over.

    Raises:
        UnusableCase: something is missing, broken, or of a kind that is not read with certainty.
    """
    if not path.is_dir():
        return decode(files.load(path))
    found = sorted(one for one in files.listed(path) if not one.name.startswith("."))
    if not found:
        raise UnusableCase("empty_folder", "Expected the files of a series, found an empty folder.")
    return decode(*map(files.load, found))


def decode(*contents: bytes) -> Image:
    """Decodes the content of one image file, or of all files of one DICOM series, in any order.

    One file is one picture or one volume by what it holds; a series of several files is a volume.
    ``MemoryError`` is passed on: the size is bounded before decoding, so the machine is to blame, and a
    case must not be refused because of what else runs on it.

    Raises:
        UnusableCase: see the codes in ``client/quarantine.py``.
    """
    return _judged(_decoded(contents))


def decode_mask(content: bytes) -> Image:
    """Decodes a file with the number of a class for each pixel; one number everywhere is a mask as well.

    Of a picture with a palette the numbers are those of its colours, of one with a bit a pixel 0 and 1.

    Raises:
        UnusableCase: as ``decode``; ``bad_mask`` for colours or numbers that are not whole.
    """
    image = _decoded((content,), mask=True)
    if image.array.shape[0] != 1 or not np.array_equal(image.array, np.rint(image.array)):
        raise UnusableCase("bad_mask", "Expected whole numbers of one channel, found others.")
    return image


def _decoded(contents: tuple[bytes, ...], *, mask: bool = False) -> Image:
    try:
        with _silent():
            return _read_file(contents[0], mask=mask) if len(contents) == 1 else series.read(contents)
    except (UnusableCase, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on damaged bytes, with header values in the text
        raise UnusableCase(dicom.code_of(error), f"The decoder ended with {type(error).__name__}.") from None


def _read_file(content: bytes, *, mask: bool) -> Image:
    if dicom.is_dicom(content):
        return series.read_file(content)
    if raster.is_raster(content):
        return raster.read(content, mask=mask)
    if content[:2] == b"\x1f\x8b" or nifti.is_nifti(content):
        return nifti.read(content)
    if not content:
        raise UnusableCase("empty_file", "Expected an image, found an empty file.")
    raise UnusableCase("unknown_format", "Expected DICOM, NIfTI, PNG, JPEG or TIFF by content.")


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
