from __future__ import annotations

import nibabel
import numpy as np
import pytest

from client import images
from tests.scans import RAMP, nifti


def test_coronal_nifti_reads_like_the_radiograph_that_it_shows() -> None:
    # axes right, anterior, superior: one slice from the front, as most tools store it
    seen = RAMP.astype(np.int16)  # rows downwards, columns to the patient's left
    stored = seen.T[::-1, None, ::-1]
    image = images.decode(nifti(stored, affine=np.diag([0.5, 2.0, 0.7, 1.0])))
    np.testing.assert_array_equal(image.array[0], seen)
    assert image.spacing_mm == pytest.approx((0.7, 0.5))


def test_nifti_without_orientation_is_taken_as_stored() -> None:
    picture = nibabel.Nifti1Image(RAMP.T, None)
    assert picture.header["sform_code"] == picture.header["qform_code"] == 0
    np.testing.assert_array_equal(images.decode(picture.to_bytes()).array[0], RAMP)


def test_nifti_2_and_big_endian_read_like_nifti_1() -> None:
    affine = np.diag([-1.0, -1, 1, 1])
    second = nibabel.Nifti2Image(RAMP.T, affine).to_bytes()
    header = nibabel.Nifti1Image(RAMP.T, affine).header.as_byteswapped(">")
    swapped = nibabel.Nifti1Image(RAMP.T, affine, header).to_bytes()
    assert swapped[:4] == (348).to_bytes(4, "big")
    for content in (second, swapped):
        np.testing.assert_array_equal(images.decode(content).array[0], RAMP)


def test_sagittal_nifti_has_rows_to_inferior_and_columns_to_posterior() -> None:
    seen = RAMP.astype(np.int16)
    stored = seen.T[None, ::-1, ::-1]  # axes right, anterior, superior
    image = images.decode(nifti(stored, affine=np.diag([3.0, 0.5, 0.7, 1.0])))
    np.testing.assert_array_equal(image.array[0], seen)
    assert image.spacing_mm == pytest.approx((0.7, 0.5))


def test_nifti_scaling_is_applied() -> None:
    picture = nibabel.Nifti1Image(RAMP.T, np.diag([-1.0, -1, 1, 1]))
    picture.header.set_slope_inter(0.5, 3)
    content = bytearray(picture.to_bytes())
    content[112:120] = np.array([0.5, 3], "<f4").tobytes()  # the writer resets what it did not choose
    np.testing.assert_array_equal(images.decode(bytes(content)).array[0], RAMP * 0.5 + 3)
