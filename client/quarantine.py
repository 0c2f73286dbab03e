"""Quarantine: every reason for which a case is not used, and what to do about it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from client import files
from client.table import Refused

REMEDIES: Mapping[str, str] = {
    # the case table
    "malformed_row": "the row has more or fewer fields than the header; correct the row",
    "missing_image": "the column image is empty; name a file relative to the site directory",
    "bad_path": "use a path relative to the site directory, without '..', '/' in front or control characters",
    "missing_label": "the column label is empty; fill it in or remove the row",
    "missing_patient": "the column patient_id is empty; fill it in or remove the row",
    "duplicate_row": "the image is listed more than once; keep one row",
    "contradictory_rows": "the image is listed with different labels or patients; keep the right row",
    "unknown_label": "the plan has no such class; correct the spelling or leave the case out",
    # the file
    "missing_file": "no such file; restore it or remove the row and freeze again",
    "not_readable": "the file cannot be opened; check its permissions and the disk",
    "changed_since_frozen": "the file differs from the frozen cohort; restore it or freeze again",
    "empty_file": "the file is empty; export it again",
    "too_large": "the image is too large; export it at a lower resolution",
    "unknown_format": "neither DICOM (part 10), NIfTI, PNG nor JPEG by content; export it again",
    "truncated": "the file is cut off; copy or export it again",
    "unreadable": "the file is damaged; export it again",
    "too_slow": "decoding does not end; export it again uncompressed",
    # DICOM
    "no_pixel_data": "a DICOM header without an image; retrieve the study again",
    "multi_frame": "several frames in one file; export one frame",
    "unsupported_transfer_syntax": "export uncompressed or with JPEG, JPEG-LS, JPEG 2000 or RLE",
    "unsupported_photometric": "export as MONOCHROME1, MONOCHROME2, RGB, YBR or PALETTE COLOR",
    "unclear_polarity": "MONOCHROME2 with an inverse presentation; export without one of them",
    "incomplete_header": "a tag that the pixels need is missing or wrong; export again",
    "bad_rescale": "rescale slope and intercept do not fit together; correct the header",
    "bad_window": "the window is not valid; correct or remove it from the header",
    "bad_spacing": "the spacing is zero, negative or not a number; export again",
    # all formats
    "unsupported_pixel_type": "export with integer grey values or RGB",
    "transparent": "parts of the image are transparent; export without alpha channel",
    "three_dimensional": "a volume of several slices; export single slices",
    "four_dimensional": "a series of volumes; export single images",
    "non_finite": "pixels are NaN or infinite; export again",
    "constant": "all pixels have one value; retrieve the image again",
    "no_contrast": "nearly all pixels have one value, nothing remains between the plan's percentiles",
}


def write(path: Path, *, refused: Iterable[Refused]) -> None:
    """Writes ``quarantine.csv``: image, code, remedy; one row per refused row of the case table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "code", "remedy"))
    ordered = sorted((one.image, one.code) for one in refused)
    writer.writerows((image, code, REMEDIES[code]) for image, code in ordered)
    files.write_private(path, content=text.getvalue().encode())
