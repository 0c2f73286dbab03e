"""Steps on places against numpy by the book, MONAI and SimpleITK; masks go where their images go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional

from client import geometry
from client.picture import Picture
from client.quarantine import REMEDIES
from common.errors import UnusableCase
from common.steps import Step

STEPS: TypeAdapter[Any] = TypeAdapter(Step)


def picture(
    *arrays: np.ndarray, mask: np.ndarray | None = None, spacing: tuple[float, ...] | None = None
) -> Picture:
    return Picture(images=tuple(array.astype(np.float32) for array in arrays), mask=mask, spacing_mm=spacing)


def done(before: Picture, name: str, *, size: tuple[int, ...] = (), **fields: Any) -> Picture:
    return geometry.moved(before, STEPS.validate_python({"name": name, **fields}), size=size)


def refusal(before: Picture, name: str, **fields: Any) -> str:
    with pytest.raises(UnusableCase) as caught:
        done(before, name, **fields)
    assert caught.value.code in REMEDIES
    return str(caught.value.code)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def triangle(length: int, size: int) -> np.ndarray:
    """Returns the (size, length) matrix of a triangle filter as wide as a target pixel."""
    scale = length / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 40, 61), (8, 9)), ((3, 5, 30), (9, 8)), ((1, 17, 30, 9), (8, 10, 12)), ((1, 3, 3, 3), (8, 8, 8))],
    ids=str,
)
def test_resizing_is_a_triangle_filter_along_each_axis(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    image = random(*shape)
    expected = image.astype(float)
    for axis, (old, new) in enumerate(zip(shape[1:], size, strict=True), start=1):
        expected = np.moveaxis(np.tensordot(triangle(old, new), expected, axes=(1, axis)), 0, axis)
    found = done(picture(image), "resize", size=size).images[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 512, 512), (3, 200, 170), (1, 20, 170)], ids=str)
def test_resizing_of_pictures_is_torchs_to_the_bit(shape: tuple[int, ...]) -> None:
    image = random(*shape)
    theirs = functional.interpolate(
        torch.from_numpy(image)[None], size=(20, 32), mode="bilinear", antialias=True
    )
    np.testing.assert_array_equal(done(picture(image), "resize", size=(20, 32)).images[0], theirs[0].numpy())


def test_nothing_on_the_way_is_larger_than_image_or_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of a metre by a hair must not become a square metre, whichever axis is the long one."""
    counts: list[int] = []
    real = functional.interpolate

    def counted(planes: torch.Tensor, **settings: Any) -> torch.Tensor:
        found = real(planes, **settings)
        counts.append(found.numel())
        return found

    monkeypatch.setattr(functional, "interpolate", counted)
    for shape, size in [((1, 4000, 2), (2, 4000)), ((1, 2, 4000), (4000, 2)), ((1, 900, 2, 2), (2, 2, 900))]:
        assert done(picture(random(*shape)), "resize", size=size).images[0].shape == (1, *size)
    assert len(counts) == 6 and max(counts) == 8000


def test_mask_takes_the_nearest_class_while_its_image_is_averaged() -> None:
    mask = np.array([[0, 2], [3, 1]], np.uint8)
    many = np.arange(54, dtype=np.uint8).reshape(6, 9)
    middles = done(picture(random(1, 6, 9), mask=many), "resize", size=(2, 3)).mask
    np.testing.assert_array_equal(middles, many[[1, 4]][:, [1, 4, 7]])
    larger = done(picture(random(1, 2, 2), mask=mask), "resize", size=(6, 8)).mask
    assert larger is not None and larger.dtype == np.uint8
    np.testing.assert_array_equal(larger, mask.repeat(3, axis=0).repeat(4, axis=1))
    smaller = done(
        picture(random(1, 6, 9, 6), mask=np.kron(np.ones((3, 3, 3)), mask).astype(np.uint8)[:6, :9, :6]),
        "resize",
        size=(2, 3, 2),
    )
    assert smaller.mask is not None and smaller.mask.shape == (2, 3, 2)
    assert set(np.unique(smaller.mask)) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("shape", "old", "new", "size"),
    [
        ((1, 60, 40), (0.5, 0.8), (1.0, 1.0), (30, 32)),
        ((1, 20, 30, 10), (1.0, 0.7, 5.0), (1.5, 1.5, 1.5), (13, 14, 33)),
        ((1, 9, 9), (0.1, 0.1), (100, 100), (1, 1)),
    ],
    ids=str,
)
def test_resampling_makes_the_spacing_asked_for_as_nearly_as_whole_pixels_allow(
    shape: tuple[int, ...], old: tuple[float, ...], new: tuple[float, ...], size: tuple[int, ...]
) -> None:
    mask = (random(*shape[1:]) * 3).astype(np.uint8)
    found = done(picture(random(*shape), random(*shape), mask=mask, spacing=old), "resample", spacing_mm=new)
    assert [image.shape for image in found.images] == [(1, *size)] * 2
    assert found.mask is not None and found.mask.shape == size
    extents = [mm * length for mm, length in zip(old, shape[1:], strict=True)]
    assert found.spacing_mm == pytest.approx([mm / length for mm, length in zip(extents, size, strict=True)])


def test_resampled_ramp_rises_by_the_millimetre_as_before() -> None:
    heights = (np.arange(40) + 0.5) * 0.5  # mm from the border
    ramp = np.broadcast_to(heights[:, None], (40, 30))[None]
    found = done(picture(ramp, spacing=(0.5, 2.0)), "resample", spacing_mm=(2.0, 2.0)).images[0]
    np.testing.assert_allclose(found[0, 1:-1, 0], ((np.arange(10) + 0.5) * 2)[1:-1], atol=1e-4)


def test_finer_resampling_is_that_of_simpleitk() -> None:
    itk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    image, old, new = random(1, 12, 10, 9), (2.0, 3.0, 1.0), (1.0, 1.5, 0.75)
    found = done(picture(image, spacing=old), "resample", spacing_mm=new).images[0][0]
    before = itk.GetImageFromArray(image[0])
    before.SetSpacing(old[::-1])
    filtered = itk.ResampleImageFilter()
    filtered.SetSize(found.shape[::-1])
    filtered.SetOutputSpacing(new[::-1])
    filtered.SetOutputOrigin([(fine - coarse) / 2 for fine, coarse in zip(new[::-1], old[::-1], strict=True)])
    filtered.SetInterpolator(itk.sitkLinear)
    theirs = itk.GetArrayFromImage(filtered.Execute(before))
    inside = (slice(2, -2),) * 3
    np.testing.assert_allclose(found[inside], theirs[inside], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((1, 8, 8), (100.0, 100.0)),
        ((1, 8, 8), (1e300, 1e300)),
        ((1, 8, 8), (1e308, 1.0)),
        ((1, 8, 1), (1e308, 0.01)),
    ],
    ids=str,
)
def test_resampling_to_more_pixels_than_a_file_may_have_is_refused(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    assert (
        refusal(picture(random(*shape), spacing=spacing), "resample", spacing_mm=(0.01, 0.01)) == "too_large"
    )


def test_resampling_without_spacing_is_refused() -> None:
    assert refusal(picture(random(1, 8, 8)), "resample", spacing_mm=(1, 1)) == "no_spacing"


@pytest.mark.parametrize("margin", [0, 2, 50])
@pytest.mark.parametrize("shape", [(1, 30, 25), (3, 30, 25), (1, 14, 17, 12)], ids=str)
def test_crop_is_that_of_monai(shape: tuple[int, ...], margin: int) -> None:
    from monai.transforms import CropForeground

    image = np.full(shape, -1000.0, np.float32)
    image[:, 4:11, 6:9] = random(*image[:, 4:11, 6:9].shape) + 5
    image[0, 1] = 4.5
    found = done(picture(image), "crop_foreground", above=4.5, margin_pixels=margin).images[0]
    crop = CropForeground(select_fn=lambda values: values > 4.5, margin=margin, allow_smaller=True)
    np.testing.assert_array_equal(found, np.asarray(crop(image)))


def test_crop_holds_the_foreground_of_every_image_and_takes_the_mask_along() -> None:
    first, second = np.zeros((1, 20, 20)), np.zeros((1, 20, 20))
    first[0, 3, 5] = second[0, 9, 2] = 1
    mask = np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)
    found = done(
        picture(first, second, mask=mask, spacing=(1, 2)), "crop_foreground", above=0.5, margin_pixels=1
    )
    assert found.mask is not None and found.spacing_mm == (1, 2)
    np.testing.assert_array_equal(found.mask, mask[2:11, 1:7])
    assert [image.shape for image in found.images] == [(1, 9, 6)] * 2


def test_image_without_foreground_is_refused() -> None:
    assert refusal(picture(random(1, 8, 8)), "crop_foreground", above=1, margin_pixels=3) == "no_foreground"


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 30, 9), (12, 14)), ((3, 8, 31), (9, 8)), ((1, 11, 8, 20), (8, 8, 33))], ids=str
)
def test_padding_and_cropping_keep_the_centre_as_monai_does(
    shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    from monai.transforms import ResizeWithPadOrCrop

    image, spacing = random(*shape), tuple(range(1, len(shape)))
    mask = (image[0] * 200).astype(np.uint8)
    found = done(picture(image, mask=mask, spacing=spacing), "pad_or_crop", size=size)
    np.testing.assert_array_equal(found.images[0], np.asarray(ResizeWithPadOrCrop(size)(image)))
    np.testing.assert_array_equal(found.mask, (found.images[0][0] * 200).astype(np.uint8))
    assert found.spacing_mm == spacing


def test_all_images_of_a_case_and_its_mask_stay_together() -> None:
    """A bright block and its mask: after each step the block is where the mask says."""
    image = np.zeros((1, 24, 30, 18))
    image[0, 6:18, 10:20, 3:9] = 1
    case = picture(image, image * 2, mask=(image[0] > 0).astype(np.uint8), spacing=(1, 1, 2))
    case = done(case, "crop_foreground", above=0.5, margin_pixels=4)
    case = done(case, "resample", spacing_mm=(0.5, 0.5, 0.5))
    case = done(case, "pad_or_crop", size=(40, 50, 64))
    case = done(case, "resize", size=(20, 25, 32))
    assert case.mask is not None
    for image, level in zip(case.images, (0.5, 1.0), strict=True):
        block = image[0] > level
        overlap = 2 * (block & (case.mask > 0)).sum() / (block.sum() + case.mask.sum())
        assert overlap > 0.9
    assert case.mask.sum() == 12 * 10 * 6 * 2, "so many cubic millimetres, and voxels of one"
