from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from client import images
from client.quarantine import REMEDIES
from common.errors import UnusableCase
from tests.scans import dicom, enhanced, grid, nifti, places, raster, series, turn

RNG = np.random.default_rng(5)
VOXELS = RNG.integers(0, 4096, (5, 4, 6)).astype(np.uint16)  # columns, rows, slices
AXIAL = np.diag([-1.0, -1, 1])  # columns to the left, rows to posterior, slices upwards
PLANES = {
    "axial": AXIAL,
    "coronal": np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": turn(13, -21, 8) @ AXIAL,
}
SPACING_MM = (0.7, 0.9, 2.5)


def affine_of(axes: np.ndarray = AXIAL) -> np.ndarray:
    return grid(axes=axes, spacing_mm=SPACING_MM)


def refused(*contents: bytes) -> str:
    with pytest.raises(UnusableCase) as caught:
        images.decode(*contents)
    assert caught.value.code in REMEDIES
    return caught.value.code


@pytest.mark.parametrize("plane", PLANES)
def test_series_enhanced_file_and_nifti_of_one_volume_read_equal(plane: str) -> None:
    affine = affine_of(PLANES[plane])
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(VOXELS, affine))
    files = series(VOXELS, affine=affine)
    RNG.shuffle(files)
    for content in (files, [enhanced(VOXELS, affine=affine)], [nifti(VOXELS, affine=affine)]):
        image = images.decode(*content)
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array, np.asarray(expected.dataobj)[None])
        assert image.affine is not None
        np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
        assert image.spacing_mm == pytest.approx(expected.header.get_zooms(), rel=1e-5)
        # every voxel is still at its place in the patient
        place = np.array([3, 1, 4, 1])
        found = np.rint(np.linalg.inv(image.affine) @ affine @ place).astype(int)
        assert image.array[(0, *found[:3])] == VOXELS[3, 1, 4]


def test_slices_are_sorted_by_place_and_not_by_number_or_name(tmp_path: Path) -> None:
    files = series(VOXELS, affine=affine_of())
    expected = images.decode(*files).array
    for name, number, place in zip("fbdaec", range(6), places(affine_of(), num_slices=6), strict=True):
        slice_ = np.ascontiguousarray(VOXELS[:, :, number].T)
        (tmp_path / name).write_bytes(dicom(slice_, InstanceNumber=9 - number, **place))
    (tmp_path / ".hidden").write_bytes(b"no image")
    np.testing.assert_array_equal(images.read(tmp_path).array, expected)


@pytest.mark.parametrize("syntax", [RLELossless, DeflatedExplicitVRLittleEndian])
def test_compressed_frames_and_files_read_like_uncompressed_ones(syntax: str) -> None:
    affine = affine_of()
    expected = images.decode(*series(VOXELS, affine=affine)).array
    tags: dict[str, Any] = {"syntax": syntax}
    np.testing.assert_array_equal(images.decode(*series(VOXELS, affine=affine, **tags)).array, expected)
    np.testing.assert_array_equal(images.decode(enhanced(VOXELS, affine=affine, **tags)).array, expected)


def test_rescale_is_that_of_each_slice_and_no_window_is_applied() -> None:
    slopes = [1, 2, 3, 4, 5, 6]
    expected = images.decode(nifti((VOXELS * np.array(slopes) - 1000.0), affine=affine_of())).array
    tags = [{"RescaleSlope": slope, "RescaleIntercept": -1000} for slope in slopes]
    window = {"WindowCenter": 50, "WindowWidth": 100}
    files = [
        dicom(np.ascontiguousarray(VOXELS[:, :, k].T), **place, **tags[k], **window)
        for k, place in enumerate(places(affine_of(), num_slices=6))
    ]
    np.testing.assert_array_equal(images.decode(*files).array, expected)
    frames = enhanced(VOXELS, affine=affine_of(), each=tags, **window)
    np.testing.assert_array_equal(images.decode(frames).array, expected)


def test_monochrome1_is_inverted_and_padding_is_darkest_over_the_whole_volume() -> None:
    stored = VOXELS.copy()
    stored[0, 0, 0] = 4095
    tags: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 4095}
    array = images.decode(*series(np.minimum(stored, 4000) + 0, affine=affine_of(), **tags)).array
    plain = images.decode(*series(np.minimum(stored, 4000) + 0, affine=affine_of())).array
    np.testing.assert_array_equal(array, 4095 - plain)
    padded = images.decode(*series(stored, affine=affine_of(), **tags)).array
    assert padded[0, 4, 3, 0] == (4095 - stored[stored < 4095].max())


def test_range_of_an_inverted_volume_is_that_of_all_its_slices() -> None:
    slopes = np.array([2, 1, 5, 3, 1, 2])
    tags = [{"RescaleSlope": int(slope), "RescaleIntercept": 0} for slope in slopes]
    content = enhanced(VOXELS, affine=affine_of(), each=tags, PhotometricInterpretation="MONOCHROME1")
    plain = images.decode(nifti((VOXELS * slopes).astype(np.int32), affine=affine_of())).array
    np.testing.assert_array_equal(images.decode(content).array, 5 * 4095 - plain)


def shifted(steps_mm: list[tuple[float, float, float]]) -> list[bytes]:
    """Returns an axial series whose slices are moved by so much: left, posterior, superior."""
    placed = places(affine_of(), num_slices=6)
    files = []
    for k, (place, step) in enumerate(zip(placed, steps_mm, strict=True)):
        position = [float(one) + by for one, by in zip(place["ImagePositionPatient"], step, strict=True)]
        slice_ = np.ascontiguousarray(VOXELS[:, :, k].T)
        files.append(dicom(slice_, **{**place, "ImagePositionPatient": position}))
    return files


def test_slices_must_be_even_straight_and_there_once() -> None:
    still = (0.0, 0.0, 0.0)
    files = series(VOXELS, affine=affine_of())
    assert refused(*files[:2], *files[3:]) == "uneven_spacing"
    assert refused(*shifted([still, still, still, (0, 0, 0.6), still, still])) == "uneven_spacing"
    assert refused(*shifted([(0, 0.2 * k, 0) for k in range(6)])) == "gantry_tilt"
    assert refused(*shifted([still, still, (0.3, 0, 0), still, still, still])) == "gantry_tilt"
    assert refused(*files, files[2]) == "repeated_slices"
    another = dicom(np.ascontiguousarray(VOXELS[:, :, 0].T), **places(affine_of(), num_slices=1)[0])
    assert refused(*files[1:], another, files[0][:-2] + b"\1\1") == "repeated_slices"
    images.decode(*shifted([(0.005, 0, 0.1 * (k % 2)) for k in range(6)]))  # digits of a header


def test_missing_slice_is_found_wherever_it_is_in_a_long_series() -> None:
    voxels = RNG.integers(0, 4096, (2, 2, 300)).astype(np.uint16)
    files = series(voxels, affine=affine_of())
    for missing in (1, 150, 298):
        assert refused(*files[:missing], *files[missing + 1 :]) == "uneven_spacing"


def test_several_slices_at_every_place_are_a_fourth_dimension() -> None:
    again = series(VOXELS[::-1].copy(), affine=affine_of())
    assert refused(*series(VOXELS, affine=affine_of()), *again) == "four_dimensional"
    twice = np.concatenate([VOXELS, VOXELS], axis=2)
    each = places(affine_of(), num_slices=6) * 2
    assert refused(enhanced(twice, affine=affine_of(), each=each)) == "four_dimensional"
    assert refused(nifti(np.stack([VOXELS, VOXELS], axis=3), affine=affine_of())) == "four_dimensional"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"SeriesInstanceUID": "1.2.3.5"}, "several_series"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "mixed_kind"),
        ({"PixelSpacing": [0.9, 0.8]}, "mixed_size"),
        ({"Columns": 4, "Rows": 5}, "mixed_size"),
        ({"PixelRepresentation": 1}, "mixed_pixel_type"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "mixed_pixel_type"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "mixed_orientation"),
        ({"ImageOrientationPatient": None}, "no_position"),
        ({"ImagePositionPatient": None}, "no_position"),
        ({"ImagePositionPatient": [1, 2]}, "no_position"),
        ({"PixelSpacing": None}, "no_position"),
        ({"PixelSpacing": [0, 1]}, "bad_spacing"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "MOSAIC"]}, "mosaic"),
        ({"NumberOfFrames": 2, "PixelData": VOXELS[:, :, :2].tobytes()}, "multi_frame"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_odd_file_among_the_slices_refuses_the_series(tags: dict[str, Any], expected: str) -> None:
    files = series(VOXELS, affine=affine_of())
    place = places(affine_of(), num_slices=6)[2]
    files[2] = dicom(np.ascontiguousarray(VOXELS[:, :, 2].T), **{**place, **tags})
    assert refused(*files) == expected


def test_folder_with_anything_but_the_files_of_a_series_is_refused(tmp_path: Path) -> None:
    files = series(VOXELS, affine=affine_of())
    assert refused(*files, b"a note\n") == "foreign_file"
    assert refused(*files, raster(VOXELS[:, :, 0])) == "foreign_file"
    assert refused(*files, b"") == "foreign_file"
    with pytest.raises(UnusableCase, match="empty folder"):
        images.read(tmp_path)


def test_directions_of_a_plane_must_be_at_right_angles() -> None:
    tags: dict[str, Any] = {"ImageOrientationPatient": [1, 0, 0, 0.1, 1, 0]}
    assert refused(*series(VOXELS, affine=affine_of(), **tags)) == "no_position"
    tags = {"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}
    assert refused(*series(VOXELS, affine=affine_of(), **tags)) == "no_position"


def test_colour_volume_and_film_are_refused() -> None:
    colours = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(range(60))}
    assert refused(*series(VOXELS, affine=affine_of(), **colours, **eight)) == "unsupported_photometric"
    nowhere = [{"ImagePositionPatient": None}] * 6
    assert refused(enhanced(VOXELS, affine=affine_of(), each=nowhere)) == "multi_frame"
    assert refused(enhanced(VOXELS, affine=affine_of(), NumberOfFrames=5)) in ("multi_frame", "excess_pixels")


def test_size_of_a_volume_is_bounded_before_its_slices_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from client import series as reader

    monkeypatch.setattr(reader, "MAX_VOXELS", 100)
    assert refused(*series(VOXELS, affine=affine_of())) == "too_large"


def test_constant_slice_is_no_constant_volume() -> None:
    voxels = VOXELS.copy()
    voxels[:, :, 0] = 0
    assert images.decode(*series(voxels, affine=affine_of())).array.max() > 0
    assert refused(*series(voxels * 0, affine=affine_of())) in ("constant", "repeated_slices")


def test_volume_is_the_same_in_nifti_1_and_2_gzipped_scaled_and_as_a_mask() -> None:
    affine = affine_of(PLANES["oblique"])
    expected = images.decode(nifti(VOXELS, affine=affine)).array
    second = nibabel.Nifti2Image(VOXELS, affine).to_bytes()
    for content in (second, gzip.compress(second), gzip.compress(nifti(VOXELS, affine=affine))):
        np.testing.assert_array_equal(images.decode(content).array, expected)
    halves = bytearray(nifti(VOXELS, affine=affine))
    halves[112:120] = np.array([0.5, 3], "<f4").tobytes()
    np.testing.assert_array_equal(images.decode(bytes(halves)).array, expected * 0.5 + 3)
    mask = (VOXELS > 2000).astype(np.uint8) * 2
    np.testing.assert_array_equal(images.decode(nifti(mask, affine=affine)).array, (expected > 2000) * 2.0)


def test_nifti_volume_that_is_not_placed_with_certainty_is_refused() -> None:
    assert refused(nibabel.Nifti1Image(VOXELS, None).to_bytes()) == "no_orientation"
    flat = affine_of()
    flat[:, 1] = 0
    content = bytearray(nifti(VOXELS, affine=affine_of()))
    content[280:328] = flat[:3].astype("<f4").tobytes()
    assert refused(bytes(content)) in ("no_orientation", "bad_spacing")
    content[280:328] = (affine_of()[:3] * [[2, 1, 1, 1]]).astype("<f4").tobytes()
    assert refused(bytes(content)) == "bad_spacing"
    sheared = affine_of()
    sheared[1, 2] = 0.6
    assert refused(nifti(VOXELS, affine=sheared)) == "gantry_tilt"


def test_metres_and_microns_become_millimetres() -> None:
    for unit, factor in (("meter", 1000.0), ("micron", 0.001)):
        picture = nibabel.Nifti1Image(VOXELS, affine_of())
        picture.header.set_xyzt_units(unit)
        image = images.decode(picture.to_bytes())
        assert image.spacing_mm == pytest.approx([factor * one for one in SPACING_MM], rel=1e-6)
