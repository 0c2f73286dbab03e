from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from client import preprocessing
from client.image import Image
from common.asked import Asked
from common.augmented import Augmentation
from common.errors import ConfigError, UnusableCase
from common.steps import Step
from tests import plans

ROOT = Path(__file__).resolve().parents[1]
PERCENTILE = {"name": "percentile", "lower": 0, "upper": 100}
GAMMA = {"name": "gamma", "gamma": 3}
RESIZE, FIT = {"name": "resize"}, {"name": "pad_or_crop"}


def asked(*, lower: float = 0, upper: float = 100, **values: Any) -> Asked:
    steps = ({"name": "percentile", "lower": lower, "upper": upper}, {"name": "resize"})
    return plans.asked(steps=steps, **values)


def applied(image: Image, asked: Asked) -> np.ndarray:
    return np.asarray(preprocessing.apply([image], asked)["image"])


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
    found = applied(image(array), asked(size=(8, 9), lower=low, upper=high))
    assert found.dtype == np.uint8 and found.shape == (1, 8, 9)
    np.testing.assert_allclose(found, oracle(array, low=low, high=high, size=(8, 9)), atol=0.502)


def test_border_of_a_bright_image_stays_bright() -> None:
    array = np.full((1, 64, 64), 100.0)
    array[0, 32, 32] = 0
    found = applied(image(array), asked())
    assert found[0, [0, -1]].min() == found[0, :, [0, -1]].min() == 255


def test_grey_is_repeated_and_colour_becomes_luminance() -> None:
    grey = np.arange(64.0).reshape(1, 8, 8)
    repeated = applied(image(grey), asked(channels=3))
    np.testing.assert_array_equal(repeated, np.repeat(applied(image(grey), asked()), 3, axis=0))
    colours = np.random.default_rng(1).integers(0, 256, (3, 8, 8)).astype(float)
    luminance = (0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2])[None]
    found = applied(image(colours), asked())
    np.testing.assert_allclose(found, oracle(luminance, low=0, high=100, size=(8, 8)), atol=0.51)


def test_colours_are_scaled_together() -> None:
    colours = np.zeros((3, 8, 8))
    colours[0] = np.arange(64.0).reshape(8, 8) * 4
    colours[1] = colours[0] / 2
    found = applied(image(colours), asked(channels=3))
    np.testing.assert_allclose(found, oracle(colours, low=0, high=100, size=(8, 8)), atol=0.51)
    assert found[1].max() == 128 and found[2].max() == 0


def test_affine_change_of_intensity_changes_nothing() -> None:
    array = np.random.default_rng(5).integers(0, 4096, (1, 33, 21)).astype(float)
    np.testing.assert_array_equal(applied(image(array), asked()), applied(image(array * 4 - 1024), asked()))


def test_number_of_threads_changes_nothing() -> None:
    array = np.random.default_rng(6).random((1, 200, 170))
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(applied(image(array), asked(size=(64, 64))).tobytes())
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_image_without_contrast_between_the_percentiles_is_refused() -> None:
    array = np.zeros((1, 20, 20))
    array[0, 0, 0] = 1
    with pytest.raises(UnusableCase) as caught:
        applied(image(array), asked(lower=1, upper=99))
    assert caught.value.code == "no_contrast"


def stepped(array: np.ndarray, *steps: dict[str, Any], **fields: Any) -> np.ndarray:
    case = Image(array=array.astype(np.float32), spacing_mm=(1.0,) * (array.ndim - 1))
    return applied(case, plans.asked(steps=steps, **fields))


def test_steps_are_done_in_their_order() -> None:
    array = np.random.default_rng(9).random((1, 32, 32))
    before, after = stepped(array, PERCENTILE, GAMMA, RESIZE), stepped(array, PERCENTILE, RESIZE, GAMMA)
    averages = array.astype(np.float32).reshape(8, 4, 8, 4)
    assert np.abs(before.astype(int) - after).max() > 20
    assert before.mean() == pytest.approx((averages**3).mean() * 255, rel=0.02)
    assert after.mean() == pytest.approx((averages.mean(axis=(1, 3)) ** 3).mean() * 255, rel=0.1)


@pytest.mark.parametrize("size", [(24, 24), (16, 16, 16)], ids=str)
def test_all_steps_together_make_one_case_of_the_asked_size(size: tuple[int, ...]) -> None:
    """With a mask and two images, in two dimensions and in three; nothing depends on threads."""
    flat = len(size) == 2
    steps: list[dict[str, Any]] = [
        {"name": "resample", "spacing_mm": (0.8,) * len(size)},
        {"name": "median", "radius_pixels": 1},
        {"name": "gaussian", "sigma_pixels": 0.5},
        {"name": "non_local_means", "patch_radius_pixels": 1, "search_radius_pixels": 1, "strength": 0.5},
        {"name": "crop_foreground", "above": 100, "margin_pixels": 2},
        PERCENTILE,
        {"name": "clahe", "clip_limit": 0.1, "tile_fraction": 0.5},
        {"name": "histogram_normalisation", "bins": 64},
        GAMMA,
        FIT if flat else RESIZE,
    ]
    asked = plans.asked(
        target="mask", steps=tuple(steps), size=size, channels=3 if flat else 1, inputs=("a", "b")
    )
    rng = np.random.default_rng(10)
    shape = tuple(length + 7 for length in size)
    images = [
        Image(
            array=rng.normal(300, 100, (channels, *shape)).astype(np.float32), spacing_mm=(1.0,) * len(size)
        )
        for channels in (1, 3 if flat else 1)
    ]
    mask = Image(array=rng.integers(0, 2, (1, *shape)).astype(np.float32), spacing_mm=None)
    threads, found = torch.get_num_threads(), set()
    for number in (1, 2):
        torch.set_num_threads(number)
        record = preprocessing.apply(images, asked, mask=mask)
        found.add(record.tobytes())
    torch.set_num_threads(threads)
    assert len(found) == 1
    assert record["image"].shape == (asked.preprocessing.num_channels, *size) and record["mask"].shape == size
    assert record["image"].std() > 10 and set(np.unique(record["mask"])) == {0, 1}
    assert {step["name"] for step in steps} | {
        "window",
        "z_score",
        "landmarks",
        "resize",
        "pad_or_crop",
    } == names()


def names() -> set[str]:
    """Returns the names of all steps that a plan may have."""
    union = get_args(Step)[0]
    return {get_args(step.model_fields["name"].annotation)[0] for step in get_args(union)}


def test_every_step_and_each_of_its_fields_is_documented() -> None:
    rows = documented("## The steps")
    for step in get_args(get_args(Step)[0]):
        fields = set(step.model_fields) - {"name"}
        name = get_args(step.model_fields["name"].annotation)[0]
        assert name in rows, name
        assert fields <= set(re.findall(r"`(\w+)`", rows[name])), name
    assert set(rows) == names()


def test_every_setting_of_augmentation_is_documented() -> None:
    assert set(documented("## Augmentation")) == set(Augmentation.model_fields)


def documented(heading: str) -> dict[str, str]:
    """Returns the rows of the table beneath a heading of the document, by their first cell."""
    text = (ROOT / "docs" / "preprocessing.md").read_text(encoding="utf-8")
    section = text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \|(.*)$", section, flags=re.MULTILINE))


CONFIGS = sorted(path.stem for path in (ROOT / "conf" / "preprocessing").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_preprocessing_config_makes_a_case(config: str) -> None:
    chosen = plans.plan(preprocessing=config).asked
    shape = (1, *(length + 5 for length in chosen.preprocessing.size))
    found = applied(image(np.random.default_rng(11).random(shape)), chosen)
    assert found.shape[1:] == chosen.preprocessing.size and found.max() > found.min()


def window_of(name: str, radius: int) -> dict[str, Any]:
    if name == "median":
        return {"name": name, "radius_pixels": radius}
    return {"name": name, "patch_radius_pixels": 1, "search_radius_pixels": radius, "strength": 1}


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([PERCENTILE], "one step resize or pad_or_crop, found 0"),
        ([PERCENTILE, RESIZE, FIT], "one step resize or pad_or_crop, found 2"),
        ([FIT, PERCENTILE], "pad_or_crop after the scaling"),
        (
            [PERCENTILE, FIT, {"name": "resample", "spacing_mm": (1, 1, 1)}],
            "pad_or_crop after all other steps",
        ),
        (
            [{"name": "resample", "spacing_mm": (1, 1, 1)}, PERCENTILE, RESIZE, window_of("median", 1)],
            "resample has no effect",
        ),
        ([PERCENTILE, RESIZE, window_of("median", 5)], "1089 pixels in the window of median, found 1331"),
        ([PERCENTILE, RESIZE, window_of("non_local_means", 5)], "window of non_local_means, found 1331"),
        ([{"name": "window", "lower": 0, "upper": 1e300}, RESIZE], "window.upper"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(steps: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plans.plan(preprocessing__size=(16, 16, 16), preprocessing__steps=steps)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [
        [{"name": "resample", "spacing_mm": (2, 2)}, PERCENTILE, FIT],
        [
            {"name": "resample", "spacing_mm": (2, 2)},
            {"name": "median", "radius_pixels": 1},
            PERCENTILE,
            RESIZE,
        ],
        [PERCENTILE, RESIZE, window_of("median", 16)],
    ],
)
def test_steps_that_fit_together_are_taken(steps: list[dict[str, Any]]) -> None:
    assert len(plans.asked(steps=tuple(steps)).preprocessing.steps) == len(steps)


def placed(affine: np.ndarray) -> Image:
    values = np.random.default_rng(0).random((1, 40, 50, 60)).astype(np.float32)
    return Image(array=values, spacing_mm=(1.0, 1.0, 1.0), affine=affine)


def turned_about_z(radians: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]]
    return turn


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (np.eye(4), True),
        (turned_about_z(0.001), True),  # 0.06 at the corners
        (turned_about_z(0.003), False),  # 0.19 at the corners
    ],
)
def test_images_whose_pixels_lie_within_a_tenth_of_a_pixel_are_one_case(
    other: np.ndarray, is_same: bool
) -> None:
    wanted = plans.asked(size=(8, 8, 8), inputs=("t1", "t2"))
    images = [placed(np.eye(4)), placed(other)]
    if is_same:
        assert preprocessing.apply(images, wanted)["image"].shape == (2, 8, 8, 8)
        return
    with pytest.raises(UnusableCase) as caught:
        preprocessing.apply(images, wanted)
    assert caught.value.code == "mismatched_inputs"


@pytest.mark.parametrize("spacing_mm", [0.1, 1.0, 5.0])
def test_tolerance_of_a_shift_grows_with_the_spacing(spacing_mm: float) -> None:
    scale = np.diag([spacing_mm, spacing_mm, 2 * spacing_mm, 1])
    for shift, expected in ((0.09, "taken"), (0.11, "mismatched_mask")):
        moved = scale.copy()
        moved[0, 3] = shift * spacing_mm
        mask = placed(moved)
        mask = Image(array=np.round(mask.array), spacing_mm=mask.spacing_mm, affine=moved)
        try:
            preprocessing.apply([placed(scale)], plans.asked(target="mask", size=(8, 8, 8)), mask=mask)
        except UnusableCase as error:
            assert error.code == expected
        else:
            assert expected == "taken"
