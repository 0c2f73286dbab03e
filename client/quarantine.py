"""Quarantine: every reason for which a case is not used, and what to do about it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from client import files
from client.case import Refused
from common.errors import Refusal

REMEDIES: Mapping[str, str] = {
    # the case table
    "malformed_row": "the row has more or fewer fields than the header; correct the row",
    "missing_image": "the column image is empty; name a file relative to the site directory",
    "bad_path": "use a path relative to the site directory, without '..', '/' in front or control characters",
    "missing_label": "the column label is empty; fill it in or remove the row",
    "missing_patient": "the column patient_id is empty; fill it in or remove the row",
    "not_in_pacs": "no fetched series of the row fits; correct the number, widen the query, or fetch again",
    "ambiguous_series": "several series of the row fit; narrow the description in cases.pacs.series",
    "incomplete_series": "some instances of the series could not be fetched; fetch again",
    "several_images": "a session has several files with the suffix; keep one, or name a longer suffix",
    "unclear_label": "a column of a class says neither 0 nor 1, no nor yes; correct the cell",
    "missing_mask": "no mask is listed; fill in the column, or leave the case out",
    "bad_value": "a clinical value is no number or none of the plan's words; correct it, or empty the cell",
    "duplicate_row": "the image is listed more than once; keep one row",
    "contradictory_rows": "the image is listed with different labels or patients; keep the right row",
    "unknown_label": "the plan has no such class; correct the spelling or leave the case out",
    # what compares cases, decided when the cohort is frozen; docs/check.md
    "duplicate_pixels": "the first copy is used; remove the others from the listing",
    "contradictory_pixels": "one picture, several labels; keep the right one in the listing",
    "shared_pixels": "give one person one name, or correct which picture is whose",
    "similar_patients": "write each patient in one way, or tell them apart clearly",
    "mixed_modalities": "list one modality, or name those that belong together in rules.modalities",
    "mixed_photometric": "list one kind; colour among grey is often a screenshot",
    # what a case is in itself, by the rules of site.yaml
    "wrong_modality": "leave it out of the listing, or add its modality to rules.modalities",
    "wrong_photometric": "leave it out of the listing, or change rules.photometric",
    "implausible_size": "export it at full resolution, or change rules.pixels",
    "implausible_spacing": "export it again with its true spacing, or change rules.spacing_mm or extent_mm",
    "burned_in_text": "export it without text; it may be a name",
    "suspected_text": "look at it; if it shows a name, export it without text",
    # the patient
    "withdrawn": "the patient withdrew; nothing is to be mended",
    # the file
    "missing_file": "no such file; restore it or remove the row and freeze again",
    "not_readable": "the file cannot be opened; check its permissions and the disk",
    "changed_since_frozen": "the file differs from the frozen cohort; restore it or freeze again",
    "empty_folder": "the folder of the series is empty; export it again",
    "empty_file": "the file is empty; export it again",
    "too_large": "the image is too large; export it at a lower resolution",
    "unknown_format": "neither DICOM (part 10), NIfTI (.nii), PNG, JPEG nor TIFF by content; export it again",
    "truncated": "the file is cut off; copy or export it again",
    "excess_pixels": "the file holds more pixels than its header says; copy or export it again",
    "unreadable": "the file is damaged; export it again",
    "out_of_memory": "no memory was left for it when it was checked; free some, and check again",
    "too_slow": "decoding does not end; export it again uncompressed",
    # DICOM
    "no_pixel_data": "a DICOM header without an image; retrieve the study again",
    "multi_frame": "several frames without a place in the patient, such as a film; export one frame",
    "mosaic": "several slices tiled into one picture; export as enhanced DICOM, single slices or NIfTI",
    "unsupported_transfer_syntax": "export uncompressed or with JPEG, JPEG-LS, JPEG 2000 or RLE",
    "unsupported_photometric": "export as MONOCHROME1 or 2, RGB, YBR or PALETTE COLOR; volumes in grey",
    "unclear_polarity": "MONOCHROME2 with an inverse presentation; export without one of them",
    "incomplete_header": "a tag that the pixels need is missing or wrong; export again",
    "bad_rescale": "rescale slope and intercept do not fit together; correct the header",
    "bad_window": "the window is not valid; correct or remove it from the header",
    "bad_spacing": "the spacing is zero, negative, not a number or contradictory; export again",
    # volumes
    "foreign_file": "the folder of a series holds files that are not DICOM; move them away",
    "several_series": "the folder holds files of several series; give each series a folder of its own",
    "mixed_kind": "images of another kind among the slices, such as a scout or screenshot; move them away",
    "mixed_size": "slices of different size or spacing; move away those that are not of the volume",
    "mixed_pixel_type": "slices of different pixel types; export the series again",
    "mixed_orientation": "slices that are not parallel, such as a localiser's; move away those of no volume",
    "no_position": "position, orientation or spacing of a slice is missing or wrong; export again",
    "no_orientation": "the file of a volume states no orientation; convert it again from DICOM",
    "repeated_slices": "some slices are there more than once; keep one of each",
    "uneven_spacing": "distances of slices differ, one may be missing; retrieve the series again",
    "gantry_tilt": "slices are shifted aside (tilted gantry), or axes oblique to each other; resample it",
    # all formats
    "unsupported_pixel_type": "export with integer grey values or RGB",
    "transparent": "parts of the image are transparent; export without alpha channel",
    "three_dimensional": "a volume where the plan asks for single slices; export single slices",
    "two_dimensional": "one slice where the plan asks for volumes; name the folder of the whole series",
    "mismatched_inputs": "the images of the case differ in size or place; register them to one grid",
    "mismatched_mask": "the mask differs from its image in size or place; export it on the image's grid",
    "bad_mask": "the mask has numbers that are no class of the plan; correct it",
    "four_dimensional": "several times, echoes or directions of diffusion; export them one by one",
    "non_finite": "pixels are NaN or infinite; export again",
    "constant": "all pixels have one value; retrieve the image again",
    "no_contrast": "nearly all pixels have one value, nothing remains between the plan's percentiles",
    "no_spacing": "the plan asks for mm and the file has no spacing; export with it, or as DICOM or NIfTI",
    "no_foreground": "no pixel is above the plan's threshold; look at the image, or leave the case out",
}

NOT_BROKEN = ("withdrawn", "unknown_label")
"""Nothing bad of the data: a patient's own wish, and a label that one plan does not ask for."""

BY_PLAN = (
    *("bad_value", "three_dimensional", "two_dimensional", "bad_mask"),
    *("no_contrast", "no_spacing", "no_foreground", "too_large"),
)
"""What a plan's wishes can bring about. ``too_many_unusable`` leaves without a charge: whoever writes plans
must not be able to ask with it how many cases are of some size or value."""


def fraction(reasons: Mapping[str, int], *, offered: int) -> float:
    """Returns the part of the offered cases that is broken, whatever a plan asks; others count nowhere."""
    aside = sum(reasons.get(code, 0) for code in (*NOT_BROKEN, *BY_PLAN))
    return (sum(reasons.values()) - aside) / max(1, offered - aside)


def require_few(reasons: Mapping[str, int], *, offered: int, most: float) -> None:
    """Checks that not more than the stated part of the offered cases is unusable.

    Raises:
        Refusal: ``too_many_unusable``.
    """
    found = fraction(reasons, offered=offered)
    if found > most:
        raise Refusal(
            "too_many_unusable",
            f"Expected at most {most:.0%} of the cases to be unusable (max_quarantined_fraction), "
            f"found {found:.0%}; feverfew-client check says why.",
        )


def write(path: Path, *, refused: Iterable[Refused]) -> None:
    """Writes ``quarantine.csv``: image, code, remedy; one row per refused row of the case table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "code", "remedy"))
    ordered = sorted((one.image, one.code) for one in refused)
    writer.writerows((image, code, REMEDIES[code]) for image, code in ordered)
    content = text.getvalue().encode()
    if not path.exists() or path.read_bytes() != content:
        files.write_private(path, content=content)
