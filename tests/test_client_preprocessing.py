from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from client import preprocessing
from client.images import Image
from common.errors import UnusableCase
from common.plan import Preprocessing


def asked(**values: Any) -> Preprocessing:
    default = {"channels": 1, "size": (8, 8), "scaling": "percentile", "lower": 0, "upper": 100}
    return Preprocessing(**{**default, **values})


def image(array: np.ndarray) -> Image:
    return Image(array=array.astype(np.float32), spacing_mm=None)


def triangle(length: int, size: int) -> np.ndarray:
    """Returns the (size, length) matrix of a triangle filter as wide as a target pixel."""
    scale = length / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def oracle(array: np.ndarray, *, low: float, high: float, size: tuple[int, int]) -> np.ndarray:
    ends = np.percentile(array.astype(float), (low, high))
    scaled = np.clip((array.astype(float) - ends[0]) / (ends[1] - ends[0]), 0, 1)
    rows, columns = triangle(array.shape[1], size[0]), triangle(array.shape[2], size[1])
    return np.asarray(np.einsum("ih,chw,jw->cij", rows, scaled, columns) * 255)


@pytest.mark.parametrize("shape", [(40, 61), (8, 8), (5, 30), (3, 4)])
@pytest.mark.parametrize(("low", "high"), [(0, 100), (2, 97.5)])
def test_scaling_and_resizing_equal_an_oracle_in_numpy(
    shape: tuple[int, int], low: float, high: float
) -> None:
    array = np.random.default_rng(3).gamma(2, 300, (1, *shape)) - 1024
    found = preprocessing.apply(image(array), asked(size=(8, 9), scaling="percentile", lower=low, upper=high))
    assert found.dtype == np.uint8 and found.shape == (1, 8, 9)
    np.testing.assert_allclose(found, oracle(array, low=low, high=high, size=(8, 9)), atol=0.502)


def test_border_of_a_bright_image_stays_bright() -> None:
    array = np.full((1, 64, 64), 100.0)
    array[0, 32, 32] = 0
    found = preprocessing.apply(image(array), asked())
    assert found[0, [0, -1]].min() == found[0, :, [0, -1]].min() == 255


def test_grey_is_repeated_and_colour_becomes_luminance() -> None:
    grey = np.arange(64.0).reshape(1, 8, 8)
    repeated = preprocessing.apply(image(grey), asked(channels=3))
    np.testing.assert_array_equal(repeated, np.repeat(preprocessing.apply(image(grey), asked()), 3, axis=0))
    colours = np.random.default_rng(1).integers(0, 256, (3, 8, 8)).astype(float)
    luminance = (0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2])[None]
    found = preprocessing.apply(image(colours), asked())
    np.testing.assert_allclose(found, oracle(luminance, low=0, high=100, size=(8, 8)), atol=0.51)


def test_colours_are_scaled_together() -> None:
    colours = np.zeros((3, 8, 8))
    colours[0] = np.arange(64.0).reshape(8, 8) * 4
    colours[1] = colours[0] / 2
    found = preprocessing.apply(image(colours), asked(channels=3))
    np.testing.assert_allclose(found, oracle(colours, low=0, high=100, size=(8, 8)), atol=0.51)
    assert found[1].max() == 128 and found[2].max() == 0


def test_affine_change_of_intensity_changes_nothing() -> None:
    array = np.random.default_rng(5).integers(0, 4096, (1, 33, 21)).astype(float)
    np.testing.assert_array_equal(
        preprocessing.apply(image(array), asked()), preprocessing.apply(image(array * 4 - 1024), asked())
    )


def test_number_of_threads_changes_nothing() -> None:
    array = np.random.default_rng(6).random((1, 200, 170))
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(preprocessing.apply(image(array), asked(size=(64, 64))).tobytes())
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_image_without_contrast_between_the_percentiles_is_refused() -> None:
    array = np.zeros((1, 20, 20))
    array[0, 0, 0] = 1
    with pytest.raises(UnusableCase) as caught:
        preprocessing.apply(image(array), asked(scaling="percentile", lower=1, upper=99))
    assert caught.value.code == "no_contrast"
