from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from client import images
from simulations import dicom_file
from simulations.anatomy import Anatomy, Difficulty, Pose, random_anatomy
from simulations.phantom import Scanner, draw, random_scanner
from simulations.projection import blur, density, line, splat, to_pixels

SIZE = 96


def patient(seed: int, *, diseased: bool = False, difficulty: Difficulty | None = None) -> Anatomy:
    rng = np.random.default_rng(seed)
    return random_anatomy(rng, diseased=diseased, difficulty=difficulty or Difficulty())


def scanner(index: int = 0, **changes: Any) -> Scanner:
    return replace(random_scanner(np.random.default_rng(index), index=index, image_size=SIZE), **changes)


def written(path: Path, device: Scanner, *, seed: int = 0, instance: int = 1) -> np.ndarray:
    pixels = draw(patient(seed, diseased=True), device, np.random.default_rng(seed))
    dicom_file.write(path, pixels, scanner=device, patient_id="7", study=f"s{seed}", instance=instance)
    return pixels


def shown(path: Path) -> np.ndarray:
    """What the hospital's reader makes of a file, from 0 (dark) to 1."""
    array: np.ndarray = images.read(path).array[0]
    picture: np.ndarray = (array - array.min()) / (array.max() - array.min())
    return picture


@pytest.mark.parametrize("index", range(6))
def test_stored_values_survive_the_file_and_fit_the_stored_bits(index: int, tmp_path: Path) -> None:
    device = scanner(index)
    pixels = written(tmp_path / "a.dcm", device)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert np.array_equal(dataset.pixel_array, pixels)
    assert pixels.shape == (device.size, device.size)
    assert pixels.max() < 2**device.bits_stored
    assert pixels.max() > 0.6 * 2**device.bits_stored


@pytest.mark.parametrize(
    "changes",
    [
        {"photometric": "MONOCHROME1"},
        {"bits_stored": 8},
        {"bits_stored": 16},
        {"rescale_slope": 0.5, "rescale_intercept": -100.0},
        {"modality": "CR", "photometric": "MONOCHROME1", "bits_stored": 16, "rescale_slope": 2.0},
    ],
)
def test_reader_shows_the_same_picture_whatever_the_encoding(changes: dict[str, Any], tmp_path: Path) -> None:
    device = scanner(0)
    written(tmp_path / "plain.dcm", device)
    written(tmp_path / "other.dcm", replace(device, **changes))
    assert np.abs(shown(tmp_path / "plain.dcm") - shown(tmp_path / "other.dcm")).max() < 0.02


def test_dense_parts_are_bright_on_every_scanner(tmp_path: Path) -> None:
    for index in range(6):
        written(tmp_path / f"{index}.dcm", scanner(index))
        picture = shown(tmp_path / f"{index}.dcm")
        middle = picture.shape[0] // 2
        assert picture[-8:, middle].mean() > 0.7  # abdomen and spine
        assert picture[:8, :8].mean() < 0.2  # air beside the neck


def test_window_cuts_off_one_percent_of_the_pixels(tmp_path: Path) -> None:
    pixels = written(tmp_path / "a.dcm", scanner(4))
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    values = pixels * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    low = float(dataset.WindowCenter) - float(dataset.WindowWidth) / 2
    outside = (values < low) | (values > low + float(dataset.WindowWidth))
    assert 0.002 < outside.mean() < 0.02


def test_header_says_what_a_scanner_says(tmp_path: Path) -> None:
    device = scanner(1)
    written(tmp_path / "a.dcm", device)
    header = pydicom.dcmread(tmp_path / "a.dcm", stop_before_pixels=True)
    assert (header.Modality, header.BodyPartExamined, header.PatientID) == ("CR", "CHEST", "7")
    assert header.SOPClassUID.name == "Computed Radiography Image Storage"
    assert [float(mm) for mm in header.PixelSpacing] == [device.pixel_mm] * 2
    assert header.Rows * device.pixel_mm == pytest.approx(device.field_mm, rel=0.01)
    assert images.read(tmp_path / "a.dcm").spacing_mm == (device.pixel_mm, device.pixel_mm)


def test_uids_follow_from_study_and_instance(tmp_path: Path) -> None:
    def uids(seed: int, instance: int) -> tuple[UID, UID]:
        written(tmp_path / "a.dcm", scanner(), seed=seed, instance=instance)
        header = pydicom.dcmread(tmp_path / "a.dcm", stop_before_pixels=True)
        assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
        assert header.SOPInstanceUID.is_valid
        return header.StudyInstanceUID, header.SOPInstanceUID

    assert uids(1, 1) == uids(1, 1)
    assert uids(1, 1)[0] == uids(1, 2)[0] != uids(2, 1)[0]
    assert len({uids(1, 1)[1], uids(1, 2)[1], uids(2, 1)[1]}) == 3


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        written(tmp_path / name, scanner(), seed=seed)
    contents = {name: (tmp_path / name).read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]


def test_four_scanners_have_every_bit_depth_and_both_interpretations() -> None:
    devices = [scanner(index) for index in range(4)]
    assert {device.bits_stored for device in devices} == {8, 12, 16}
    assert {device.photometric for device in devices} == {"MONOCHROME1", "MONOCHROME2"}
    assert {device.modality for device in devices} == {"DX", "CR"}


def test_opacities_are_the_only_difference_and_lie_in_the_lungs() -> None:
    for seed in range(8):
        diseased = patient(seed, diseased=True)
        healthy = replace(diseased, opacities=())
        added = density(diseased, pose=Pose(), size=SIZE) - density(healthy, pose=Pose(), size=SIZE)
        axis = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1
        x, y = np.meshgrid(axis, axis)
        chest = (np.abs(x) < diseased.chest_half_width + 0.06) & (y > diseased.apex_y - 0.06) & (y < 0.75)
        assert diseased.opacities
        assert added.min() > -1e-3
        assert added.max() > 0.02
        assert np.abs(added[~chest]).max() < 2e-3


def test_healthy_patients_have_no_opacity_and_diseased_ones_one_to_four() -> None:
    assert all(not patient(seed).opacities for seed in range(20))
    assert {len(patient(seed, diseased=True).opacities) for seed in range(400)} == {1, 2, 3, 4}


def test_low_severity_exponent_makes_findings_plain() -> None:
    def mean_contrast(exponent: float) -> float:
        difficulty = Difficulty(severity_exponent=exponent)
        found = [patient(seed, diseased=True, difficulty=difficulty).opacities for seed in range(60)]
        return float(np.mean([opacity.contrast for opacities in found for opacity in opacities]))

    assert mean_contrast(0.2) > mean_contrast(1.0) + 0.15


def test_shift_of_the_patient_shifts_the_picture() -> None:
    someone = patient(3, diseased=True)
    still = density(someone, pose=Pose(), size=SIZE)
    moved = density(someone, pose=Pose(shift_x=2 * 5 / SIZE, shift_y=-2 * 3 / SIZE), size=SIZE)
    # Apart from the border: what is outside the picture is not blurred into it.
    assert np.allclose(moved[8:-8, 12:-8], still[11:-5, 7:-13], atol=2e-3)


def test_points_turn_with_the_patient() -> None:
    points = np.array([[0.5, 0.0, 1.0]], np.float32)
    pose = Pose(angle_radians=np.pi / 2, scale=0.5)
    # 0.5 to the right, turned by a quarter towards the feet, at half the scale.
    expected = np.array([[49.5, 62.0, 1.0]])
    assert np.allclose(to_pixels(points, pose=pose, size=100), expected, atol=1e-5)


def test_splat_keeps_the_sum_of_weights_and_the_place() -> None:
    image = splat(np.array([[40.25, 63.5, 2.0]], np.float32), size=128, blur_pixels=1.0)
    rows, columns = np.indices(image.shape)
    assert image.sum() == pytest.approx(2.0, rel=1e-5)
    assert (image * columns).sum() / 2 == pytest.approx(40.25, rel=1e-5)
    assert (image * rows).sum() / 2 == pytest.approx(63.5, rel=1e-5)


def test_splat_ignores_points_outside() -> None:
    points = np.array([[-5, 3, 1], [3, 500, 1], [-1.5, -1.5, 1]], np.float32)
    assert not splat(points, size=32, blur_pixels=0.0).any()


def test_blur_of_an_impulse_has_the_asked_width() -> None:
    impulse = np.zeros((65, 65), np.float32)
    impulse[32, 32] = 1
    blurred = blur(impulse, sigma_pixels=2.0)
    variance = (blurred.sum(axis=0) * (np.arange(65) - 32) ** 2).sum()
    assert blurred.sum() == pytest.approx(1.0, rel=1e-5)
    assert variance == pytest.approx(4.0, rel=0.03)
    assert np.allclose(blur(np.full((20, 20), 3.0, np.float32), sigma_pixels=1.5), 3.0)


def test_line_is_evenly_spaced_along_its_corners() -> None:
    points = line([(0, 0), (0.3, 0), (0.3, 0.4)], weight=2.0)
    steps = np.hypot(*np.diff(points[:, :2], axis=0).T)
    assert np.allclose(points[[0, -1], :2], np.array([[0, 0], [0.3, 0.4]]), atol=1e-6)
    assert np.allclose(points[:, 2], 2.0)
    assert steps.max() < 1.05 / 128 * 1.1


def test_noise_and_exposure_differ_between_images_of_a_patient() -> None:
    someone, device, rng = patient(5), scanner(), np.random.default_rng(0)
    first, second = draw(someone, device, rng), draw(someone, device, rng)
    assert not np.array_equal(first, second)
    assert first.shape == second.shape
