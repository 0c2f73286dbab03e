"""Steps on intensities against closed forms, numpy by the book, MONAI, scikit-image and SimpleITK."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import TypeAdapter
from scipy import stats

from client import contrast, denoising, intensity
from client.quarantine import REMEDIES
from common.errors import UnusableCase
from common.steps import Step

STEPS: TypeAdapter[Any] = TypeAdapter(Step)
SHAPES = [(1, 23, 30), (3, 23, 30), (1, 12, 15, 9), (1, 16, 20, 3), (3, 9, 10, 11), (1, 8, 2, 1)]
ON_INTENSITIES: list[dict[str, Any]] = [
    {"name": "median", "radius_pixels": 1},
    {"name": "gaussian", "sigma_pixels": 0.8},
    {"name": "non_local_means", "patch_radius_pixels": 1, "search_radius_pixels": 2, "strength": 0.8},
    {"name": "percentile", "lower": 1, "upper": 99},
    {"name": "window", "lower": 0.2, "upper": 0.7},
    {"name": "z_score", "limit": 2},
    {"name": "landmarks", "percentiles": [5, 50, 95], "values": [0, 0.3, 1]},
    {"name": "clahe", "clip_limit": 0.05, "tile_fraction": 0.25},
    {"name": "histogram_normalisation", "bins": 64},
    {"name": "gamma", "gamma": 0.6},
]


def done(array: np.ndarray, name: str, **fields: Any) -> np.ndarray:
    step = STEPS.validate_python({"name": name, **fields})
    return intensity.changed(array.astype(np.float32), step)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def windows(image: np.ndarray, radius: int) -> Iterator[np.ndarray]:
    """Yields for each channel the values about each pixel, the border repeated: (*spatial, values)."""
    for channel in image:
        padded = np.pad(channel, radius, mode="edge")
        seen = sliding_window_view(padded, (2 * radius + 1,) * channel.ndim)
        yield seen.reshape(*channel.shape, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fields", ON_INTENSITIES, ids=lambda fields: fields["name"])
def test_step_keeps_shape_type_and_unit_range_and_does_not_write_to_its_input(
    fields: dict[str, Any], shape: tuple[int, ...]
) -> None:
    before = random(*shape)
    found = done(before, **fields)
    assert found.shape == shape and found.dtype == np.float32
    assert 0 <= found.min() < found.max() <= 1
    assert not np.array_equal(found, before)
    np.testing.assert_array_equal(before, random(*shape))


@pytest.mark.parametrize("fields", ON_INTENSITIES, ids=lambda fields: fields["name"])
def test_number_of_threads_changes_nothing(fields: dict[str, Any]) -> None:
    threads, found = torch.get_num_threads(), set()
    for number in (1, 2):
        torch.set_num_threads(number)
        found |= {
            done(random(1, 150, 170), **fields).tobytes(),
            done(random(1, 40, 30, 20), **fields)[0, 0, 0, 0],
        }
    torch.set_num_threads(threads)
    assert len(found) == 2


@pytest.mark.parametrize(("low", "high"), [(13.7, 3011.3), (0.1, 2866.2), (-1024.0, 333.0), (0, 1e-20)])
def test_scaling_between_two_intensities_is_monais_to_the_bit(low: float, high: float) -> None:
    from monai.transforms import ScaleIntensityRange

    image = np.random.default_rng(1).integers(-1024, 4096, (1, 64, 50)).astype(np.float32)
    theirs = ScaleIntensityRange(a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)(image)
    np.testing.assert_array_equal(intensity.between(image, low, high), np.asarray(theirs))


@pytest.mark.parametrize(("low", "high"), [(0, 100), (1, 99), (2.3, 97.1)])
def test_scaling_by_percentile_is_monais_to_the_bit(low: float, high: float) -> None:
    from monai.transforms import ScaleIntensityRangePercentiles

    image = np.random.default_rng(1).integers(-1024, 4096, (3, 64, 50)).astype(np.float32)
    theirs = ScaleIntensityRangePercentiles(low, high, 0, 1, clip=True)(image)
    np.testing.assert_array_equal(done(image, "percentile", lower=low, upper=high), np.asarray(theirs))


def test_window_keeps_differences_of_contrast_between_images() -> None:
    units = np.array([[[-200.0, -160, 40, 240, 900]]])
    np.testing.assert_allclose(done(units, "window", lower=-160, upper=240), [[[0, 0, 0.5, 1, 1]]], atol=1e-6)


def test_z_score_puts_the_mean_in_the_middle_and_the_limit_at_the_ends() -> None:
    image = 1000 + 7 * random(1, 30, 40)
    scores = (image - image.mean()) / image.std()
    np.testing.assert_allclose(done(image, "z_score", limit=1.5), np.clip(scores / 3 + 0.5, 0, 1), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
@pytest.mark.parametrize(
    "fields",
    [
        {"name": "percentile", "lower": 0, "upper": 100},
        {"name": "z_score", "limit": 3},
        {"name": "landmarks", "percentiles": [0, 100], "values": [0, 1]},
        {"name": "clahe", "clip_limit": 0.1, "tile_fraction": 0.5},
        {"name": "histogram_normalisation", "bins": 16},
    ],
    ids=lambda fields: fields["name"],
)
def test_image_of_one_value_has_no_contrast(fields: dict[str, Any], value: float) -> None:
    with pytest.raises(UnusableCase) as caught:
        done(np.full((1, 30, 37), value), **fields)
    assert caught.value.code == "no_contrast" and "no_contrast" in REMEDIES
    assert str(value) not in str(caught.value) or value == 0


def test_values_too_far_apart_for_a_float_are_refused() -> None:
    with pytest.raises(UnusableCase):
        done(np.array([[[-3e38, 3e38]]]), "percentile", lower=0, upper=100)


def test_landmarks_bring_percentiles_to_their_values_whatever_the_scanner() -> None:
    """A monotone change of all intensities, as another scanner makes, leaves the landmarks where they are."""
    image = np.random.default_rng(2).permutation(np.arange(1001.0)).reshape(1, 7, 143)
    fields: dict[str, Any] = {"percentiles": [10, 50, 90], "values": [0.1, 0.3, 0.8]}
    for scanned in (image, 3 * image - 50, np.sqrt(image) * 10):
        found = done(scanned, "landmarks", **fields)
        np.testing.assert_allclose(np.percentile(found, (10, 50, 90)), (0.1, 0.3, 0.8), atol=1e-5)
        assert found.min() == np.float32(0.1) and found.max() == np.float32(0.8)
    halfway = done(image, "landmarks", **fields)[image == 300]
    np.testing.assert_allclose(halfway, 0.2, atol=1e-5)


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("shape", [(1, 23, 30), (3, 9, 12), (1, 7, 8, 9), (1, 3, 2, 1)], ids=str)
def test_median_is_that_of_the_square_or_cube_with_the_border_repeated(
    shape: tuple[int, ...], radius: int
) -> None:
    image = random(*shape)
    expected = [np.median(values, axis=-1) for values in windows(image, radius)]
    np.testing.assert_array_equal(done(image, "median", radius_pixels=radius), expected)


def test_median_is_that_of_simpleitk_and_inside_that_of_monai() -> None:
    itk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    from monai.transforms import MedianSmooth

    image = random(1, 9, 14, 11)
    found = done(image, "median", radius_pixels=2)
    theirs = itk.GetArrayFromImage(itk.Median(itk.GetImageFromArray(image[0]), [2, 2, 2]))
    np.testing.assert_array_equal(found[0], theirs)
    inside = (0, *(slice(2, -2),) * 3)
    np.testing.assert_array_equal(found[inside], np.asarray(MedianSmooth(2)(image))[inside])


@pytest.mark.parametrize("spatial", [(41, 43), (25, 23, 27)], ids=str)
def test_gaussian_spreads_a_point_as_a_normal_density(spatial: tuple[int, ...]) -> None:
    sigma, middle = 2.0, tuple(length // 2 for length in spatial)
    point = np.zeros((1, *spatial))
    point[0][middle] = 1
    found = done(point, "gaussian", sigma_pixels=sigma)[0]
    grids = np.meshgrid(
        *(np.arange(length) - at for length, at in zip(spatial, middle, strict=True)), indexing="ij"
    )
    density = np.prod([stats.norm.pdf(grid, scale=sigma) for grid in grids], axis=0)
    np.testing.assert_allclose(found, density, atol=2e-3 * density.max())
    assert found.sum() == pytest.approx(1, abs=1e-4)


def test_filters_leave_the_border_of_a_bright_image_bright() -> None:
    for fields in ON_INTENSITIES[:3]:
        bright = np.full((1, 20, 20), 0.7, np.float32)
        bright[0, 9:11, 9:11] = 0
        border = np.ones((20, 20), bool)
        border[4:-4, 4:-4] = False
        np.testing.assert_allclose(done(bright, **fields)[0][border], 0.7, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 120, 130), (3, 70, 90), (1, 30, 28, 26)], ids=str)
@pytest.mark.parametrize("background", [False, True])
def test_standard_deviation_of_noise_is_found_beneath_structures(
    shape: tuple[int, ...], background: bool
) -> None:
    rng = np.random.default_rng(4)
    ramp = np.linspace(0, 300, shape[-1])
    disc = 200.0 * (np.hypot(*np.ogrid[-1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]) < 0.6)
    smooth = ramp + disc.reshape(1, *disc.shape, *(1,) * (len(shape) - 3)) if len(shape) == 4 else disc + ramp
    noisy = smooth + rng.normal(0, 12, shape)
    if background:
        noisy[:, : shape[1] // 2] = 0
    assert denoising.noise_std(noisy.astype(np.float32)) == pytest.approx(12, rel=0.1)


def by_the_book(image: np.ndarray, *, patch: int, search: int, h: float, sigma: float) -> np.ndarray:
    """Non-local means of one pixel after the other, the border repeated."""
    reach = patch + search
    padded = np.pad(image.astype(float), reach, mode="edge")
    patches = sliding_window_view(padded, (2 * patch + 1,) * image.ndim)
    pixels = tuple(range(image.ndim, 2 * image.ndim))
    result = np.empty(image.shape)
    for place in np.ndindex(*image.shape):
        near = patches[tuple(slice(start, start + 2 * search + 1) for start in place)]
        own = near[(search,) * image.ndim]
        weights = np.exp(-np.maximum(((near - own) ** 2).mean(axis=pixels) - 2 * sigma**2, 0) / h**2)
        middles = near[..., *(patch,) * image.ndim]
        result[place] = (weights * middles).sum() / weights.sum()
    return result


@pytest.mark.parametrize(
    ("shape", "patch", "search"), [((24, 20), 1, 3), ((24, 20), 2, 2), ((12, 13, 11), 1, 2)]
)
def test_non_local_means_is_that_of_the_book(shape: tuple[int, ...], patch: int, search: int) -> None:
    image = (random(*shape) * 100).astype(np.float32)
    image[:, 10:] += 500
    sigma = denoising.noise_std(image[None])
    fields = {"patch_radius_pixels": patch, "search_radius_pixels": search, "strength": 0.8}
    found = done(image[None], "non_local_means", **fields)[0]
    expected = by_the_book(image, patch=patch, search=search, h=0.8 * sigma, sigma=sigma)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 60, 64), (1, 24, 24, 24), (3, 40, 48)], ids=str)
def test_non_local_means_takes_noise_away_and_leaves_edges(shape: tuple[int, ...]) -> None:
    clean = np.zeros(shape)
    clean[:, shape[1] // 2 :] = 1000
    noisy = clean + np.random.default_rng(5).normal(0, 30, shape)
    fields = {"patch_radius_pixels": 1, "search_radius_pixels": 3, "strength": 1.0}
    found = done(noisy, "non_local_means", **fields)
    assert np.abs(found - clean).std() < 0.5 * 30
    assert np.abs(found - clean).max() < np.abs(noisy - clean).max()


def test_non_local_means_of_an_image_without_noise_is_the_image() -> None:
    square = np.zeros((1, 20, 20), np.float32)
    square[0, 5:, :] = 7
    fields = {"patch_radius_pixels": 1, "search_radius_pixels": 2, "strength": 1.0}
    np.testing.assert_array_equal(done(square, "non_local_means", **fields), square)


def test_clahe_with_one_tile_and_no_limit_ranks_all_values() -> None:
    image = random(1, 64, 64) ** 1.5
    found = done(image, "clahe", clip_limit=1, tile_fraction=1)
    ranks = stats.rankdata(image).reshape(image.shape) / image.size
    np.testing.assert_allclose(found, ranks, atol=0.03)
    order = np.argsort(image, axis=None)
    assert (np.diff(found.ravel()[order]) >= 0).all()


def test_clahe_lifts_faint_texture_in_the_dark_and_less_so_under_a_limit() -> None:
    image = np.full((1, 64, 64), 0.02, np.float32)
    image[0, :, 32:] = 0.9
    image[0, ::2, :] += 0.02
    found = {limit: done(image, "clahe", clip_limit=limit, tile_fraction=0.25) for limit in (0.02, 1.0)}
    texture = {limit: np.abs(np.diff(one[0, :, :24], axis=0)).mean() for limit, one in found.items()}
    assert texture[1.0] > 2 * texture[0.02] > 2 * 0.02


def test_clahe_of_colours_is_that_of_scikit_image() -> None:
    from skimage import exposure

    image = random(3, 32, 40)
    image[:, 4, 5] = 0
    theirs = exposure.equalize_adapthist(np.moveaxis(image, 0, -1), kernel_size=(8, 10), clip_limit=0.05)
    found = done(image, "clahe", clip_limit=0.05, tile_fraction=0.25)
    np.testing.assert_allclose(np.moveaxis(found, 0, -1), theirs, atol=1e-4)


@pytest.mark.parametrize("slices", [3, 4])
def test_clahe_does_not_take_slices_for_colours(slices: int) -> None:
    image = random(1, 20, 24, slices) ** 2
    fields = {"clip_limit": 0.1, "tile_fraction": 0.5}
    turned = done(np.moveaxis(image, 3, 1), "clahe", **fields)
    np.testing.assert_allclose(done(image, "clahe", **fields), np.moveaxis(turned, 1, 3), atol=2 / 255)


def test_clahe_refuses_differences_that_it_would_lose() -> None:
    image = np.full((1, 16, 16), 0.5, np.float32)
    image[0, 0, 0] += 1e-6
    with pytest.raises(UnusableCase):
        done(image, "clahe", clip_limit=0.1, tile_fraction=0.5)


@pytest.mark.parametrize("shape", [(1, 80, 70), (1, 20, 15, 18), (3, 40, 45)], ids=str)
def test_histogram_normalisation_makes_values_equally_frequent(shape: tuple[int, ...]) -> None:
    image = random(*shape, seed=8) ** 2
    found = done(image, "histogram_normalisation", bins=4096)
    ranks = stats.rankdata(image).reshape(shape) / image.size
    np.testing.assert_allclose(found, ranks, atol=0.03)
    assert stats.kstest(found.ravel(), "uniform").statistic < 0.03


def test_gamma_is_a_power_whatever_else_is_in_the_image() -> None:
    image = np.array([[[0, 0.25, 0.5]]])
    np.testing.assert_allclose(done(image, "gamma", gamma=2), [[[0, 0.0625, 0.25]]], atol=1e-7)
    np.testing.assert_allclose(done(image, "gamma", gamma=0.5), [[[0, 0.5, math.sqrt(0.5)]]], atol=1e-7)


def test_step_on_places_is_none_on_intensities() -> None:
    with pytest.raises(ValueError, match="expected a step on intensities, found resize"):
        done(random(1, 8, 8), "resize")


def test_black_in_colours_becomes_grey() -> None:
    image = np.zeros((3, 1, 2), np.float32)
    image[:, 0, 1] = (0.2, 0.4, 0.1)
    found = contrast._brightened(image, np.array([[0.3, 0.8]], np.float32))
    np.testing.assert_allclose(found[:, 0, 0], 0.3)
    np.testing.assert_allclose(found[:, 0, 1], (0.4, 0.8, 0.2), atol=1e-6)
